"""What the Create tab does: one prompt from one noise under two guidance rules, or a grid over scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .checks import LONGEST_PROMPT, is_number, is_whole
from .code import Raw, call, load_pipeline_code
from .limits import BUNDLED

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import LoadedModel
    from .runs import Run

__all__ = ["CreateJob", "Created", "grid_scales", "python_code", "rule_names"]

_MOST_STEPS = 100
_OTHER_SCALES = {"cfg++": (0.2, 0.4, 0.6, 0.8, 1.0), "autoguidance": (1.25, 1.5, 2.0, 2.5, 3.0)}
"""Of rules whose scale means something else; plain guidance beside them has its usual 5."""


@dataclass(frozen=True)
class Created:
    """What there is so far.

    Attributes:
        pictures: (label, picture, saturation) each, in the order in which they are made.
        preview: what the next one will be.
        notes: what else to know.
        arguments: of the model's call for the last picture that depend on the model, by their names there.
    """

    pictures: tuple[tuple[str, Image, float], ...] = ()
    preview: Image | None = None
    notes: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CreateJob:
    """Pictures to make.

    Attributes:
        prompt: what they show.
        negative_prompt: what to guide away from; may be empty.
        guidance: a name of ``trimtab.guidance.GUIDERS``.
        guidance_scale: 0 to 30.
        seed: of the noise.
        steps: of the sampler.
        grid: over the rule's scales, and plain guidance's beside them, in place of the one scale.
        model: its name.
    """

    prompt: str
    negative_prompt: str = ""
    guidance: str = "apg"
    guidance_scale: float = 10.0
    seed: int = 0
    steps: int = 20
    grid: bool = False
    model: str = BUNDLED

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("The prompt is empty: say what the picture shows.")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name) or "") > LONGEST_PROMPT:
                raise ValueError(f"The {name.replace('_', ' ')} takes up to {LONGEST_PROMPT} characters.")
        if self.guidance not in rule_names():
            raise ValueError(f"The guidance rule takes one of {', '.join(rule_names())}.")
        if not is_number(self.guidance_scale, 0, 30):
            raise ValueError("The guidance scale takes a number from 0 to 30.")
        if not is_whole(self.seed, 0, 2**63 - 1):
            raise ValueError("The seed takes a whole number, 0 or more.")
        if not is_whole(self.steps, 1, _MOST_STEPS):
            raise ValueError(f"The steps take a whole number from 1 to {_MOST_STEPS}.")

    def seconds(self) -> float:
        """About how long it takes on a GPU."""
        return 0.3 * self.steps * len(self.cells())

    def cells(self) -> list[tuple[str, float]]:
        """(rule, scale) of the pictures, in the order in which they are made."""
        scales = grid_scales(self.guidance) if self.grid else (self.guidance_scale,)
        if self.guidance == "cfg":
            return [("cfg", scale) for scale in scales] if self.grid else [("cfg", 1.0), ("cfg", self.guidance_scale)]
        if self.guidance in _OTHER_SCALES:
            return [("cfg", 5.0), *((self.guidance, scale) for scale in scales)]
        return [(rule, scale) for rule in ("cfg", self.guidance) for scale in scales]

    def run(self, loaded: LoadedModel, run: Run) -> None:
        """Makes them one after another, each with previews."""
        import numpy as np
        import torch

        from trimtab.commands.edit import sequence_length
        from trimtab.commands.sampling import guidance_arguments, sample
        from trimtab.guidance import saturation

        notes = loaded.unknown_words(self.prompt, self.negative_prompt)
        height, width = loaded.size_within(run.largest_picture)
        made: list[tuple[str, Image, float]] = []

        def preview(picture: Image) -> None:
            run.emit(Created(tuple(made), picture, notes))

        for rule, scale in self.cells():
            label = _label(rule, scale)
            image = sample(
                loaded.pipe,
                [self.prompt],
                [self.seed],
                guidance=rule,
                guidance_scale=scale,
                steps=self.steps,
                height=height,
                width=width,
                negative_prompt=self.negative_prompt or None,
                on_step=run.step(self.steps, f"{label}: step", on_preview=preview, height=height, width=width),
            )[0]
            pixels = torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)[None] / 255
            made.append((label, image, saturation(pixels).item()))
            asked = guidance_arguments(loaded.pipe, rule, scale, self.negative_prompt or None)
            asked |= sequence_length(loaded.pipe)
            run.emit(Created(tuple(made), None, notes, asked), f"{label} is there")


def rule_names() -> list[str]:
    """Guidance rules that need nothing but a scale, the most useful first."""
    from trimtab.commands.sampling import guidance_names

    return ["apg", "cfg", *(name for name in guidance_names() if name not in ("apg", "cfg"))]


def grid_scales(rule: str) -> tuple[float, ...]:
    """The scales of a grid."""
    return _OTHER_SCALES.get(rule, (3.0, 5.0, 7.0, 10.0, 15.0))


def python_code(job: CreateJob, arguments: Mapping[str, Any]) -> str:
    """The code that makes the picture under the chosen rule again.

    Args:
        job: the settings.
        arguments: as in :class:`Created`.
    """
    imports, load = load_pipeline_code(job.model)
    image = call(
        "image = pipe",
        [job.prompt],
        **arguments,
        num_inference_steps=job.steps,
        generator=Raw(f'[torch.Generator("cpu").manual_seed({job.seed})]'),
    )
    lines = [f"{image}.images[0]"]
    if job.guidance != "cfg":
        imports.append("from trimtab.guidance import attach, make_guider")
        inner = lines[0].replace("\n", "\n    ")
        guider = call("guider = make_guider", job.guidance, float(job.guidance_scale), Raw("pipe"))
        lines = [guider, "with attach(pipe, guider):", f"    {inner}"]
    return "\n".join([*imports, "", load, *lines, 'image.save("picture.png")', ""])


def _label(rule: str, scale: float) -> str:
    return "No guidance" if rule == "cfg" and scale == 1 else f"{rule.upper()} {scale:g}"
