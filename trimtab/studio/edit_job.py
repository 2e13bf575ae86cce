"""What the Edit tab does: a picture is edited by FlowOpt, every iterate shown, or by another method in one go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Image

from .checks import LONGEST_PROMPT, is_number, is_whole
from .code import call, load_pipeline_code, sequence_length_code
from .limits import BUNDLED

if TYPE_CHECKING:
    from .model import LoadedModel
    from .runs import Run

__all__ = ["BLENDS", "METHODS", "EditJob", "Edited", "python_code"]

_PREVIEWS = 0.5
"""Seconds between previews, at least."""

METHODS = (
    "flowopt",
    "flowedit",
    "sdedit",
    "ode-inversion",
    "uni-inv",
    "rf-inversion",
    "rf-solver",
    "fireflow",
)
BLENDS = ("feather", "poisson", "poisson-mixed", "none")


@dataclass(frozen=True)
class Edited:
    """What there is so far.

    Attributes:
        source: the picture as the model gets it.
        iterates: the edits, the freest first.
        preview: what the next one will be.
        notes: what else to know.
    """

    source: Image | None = None
    iterates: tuple[Image, ...] = ()
    preview: Image | None = None
    notes: str = ""


@dataclass(frozen=True)
class EditJob:
    """An edit.

    Attributes:
        image: an RGB picture.
        source_prompt: what it shows; may be empty.
        prompt: what it is to show.
        mask: white where it may change; None is everywhere.
        method: one of ``METHODS``.
        strength: in (0, 1].
        guidance_scale: 0 to 30.
        steps: of the full schedule.
        iterations: FlowOpt's updates.
        blend: one of ``BLENDS``: how the edit is set into the picture under a mask.
        model: its name.
    """

    image: Image
    source_prompt: str
    prompt: str
    mask: Image | None = None
    method: str = "flowopt"
    strength: float = 0.8
    guidance_scale: float = 3.5
    steps: int = 15
    iterations: int = 8
    blend: Literal["feather", "poisson", "poisson-mixed", "none"] = "feather"
    model: str = BUNDLED

    def __post_init__(self) -> None:
        if self.image is None:
            raise ValueError("There is no picture: upload one, pick an example, or send one from another tab.")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("The target prompt is empty: say what the picture is to show.")
        if max(len(self.prompt), len(self.source_prompt or "")) > LONGEST_PROMPT:
            raise ValueError(f"The prompts take up to {LONGEST_PROMPT} characters.")
        if self.method not in METHODS:
            raise ValueError(f"The method takes one of {', '.join(METHODS)}.")
        if self.blend not in BLENDS:
            raise ValueError(f"The blend takes one of {', '.join(BLENDS)}.")
        for name, low, high in (("strength", 0.01, 1), ("guidance_scale", 0, 30)):
            if not is_number(getattr(self, name), low, high):
                raise ValueError(f"The {name.replace('_', ' ')} takes a number from {low} to {high}.")
        for name, low, high in (("steps", 1, 100), ("iterations", 0, 50)):
            if not is_whole(getattr(self, name), low, high):
                raise ValueError(f"The {name} take a whole number from {low} to {high}.")

    def seconds(self) -> float:
        """About how long it takes on a GPU."""
        return 0.3 * self.steps * (self.iterations + 4 if self.method == "flowopt" else 4)

    def run(self, loaded: LoadedModel, run: Run) -> None:
        """Makes the edit."""
        from trimtab.commands.edit import as_picture, sequence_length
        from trimtab.pipelines import EditPipeline, FlowOptPipeline
        from trimtab.pipelines.flowopt_task import steps_of
        from trimtab.pipelines.images import fit_images, fitted_size

        notes = loaded.unknown_words(self.source_prompt, self.prompt)
        own = loaded.size_within(run.largest_picture)
        width, height = fitted_size(self.image.size, own[0] * own[1], loaded.multiple)
        source = as_picture(fit_images([self.image], (width, height))[0])
        made: list[Image] = []

        def preview(picture: Image) -> None:
            run.emit(Edited(source, tuple(made), picture, notes))

        run.emit(Edited(source, (), None, notes))
        steps = steps_of(self.strength, self.steps)
        total = steps * (self.iterations + 4 if self.method == "flowopt" else 2)
        shared: dict[str, Any] = {
            "prompt": self.prompt,
            "source_prompt": self.source_prompt or "",
            "strength": float(self.strength),
            "guidance_scale": float(self.guidance_scale),
            "num_inference_steps": self.steps,
            "height": height,
            "width": width,
            **self._masked(self.mask),
            "callback_on_step_end": run.step(total, on_preview=preview, height=height, width=width),
        }
        if self.method != "flowopt":
            edit = EditPipeline.from_pipe(loaded.pipe, method=self.method)
            shown = time.monotonic()

            def estimate(step: int, pictures: Callable[[], Any]) -> None:
                nonlocal shown
                if step == 0 or time.monotonic() - shown > _PREVIEWS:
                    preview(as_picture(pictures()[0]))
                    shown = time.monotonic()

            result = edit(self.image, callback_on_estimate=estimate, **shared, **sequence_length(loaded.pipe))
            made.append(result.images[0])
            run.emit(Edited(source, tuple(made), None, notes))
            return
        import torch

        edit = FlowOptPipeline.from_pipe(loaded.pipe)
        states = edit.stream(
            self.image,
            num_optimization_steps=self.iterations,
            **shared,
            **sequence_length(edit),
        )
        with torch.no_grad():
            for state in states:
                made.append(as_picture(state.images[0]))
                run.emit(Edited(source, tuple(made), None, notes), f"iterate {state.iteration} is there")
                run.check()

    def _masked(self, mask: Any) -> dict[str, Any]:
        return {} if self.mask is None else {"mask_image": mask, "blend": self.blend}


def python_code(job: EditJob) -> str:
    """The code that makes the last iterate again; the picture and the mask are files of the person's."""
    imports, load = load_pipeline_code(job.model)
    own = job.method == "flowopt"
    imports.append(f"from trimtab.pipelines import {'FlowOptPipeline' if own else 'EditPipeline'}")
    make = "edit = FlowOptPipeline.from_pipe" if own else "edit = EditPipeline.from_pipe"
    arguments: dict[str, Any] = {
        "source_prompt": job.source_prompt,
        "prompt": job.prompt,
        **job._masked("mask.png"),
        "strength": float(job.strength),
        "guidance_scale": float(job.guidance_scale),
        "num_inference_steps": job.steps,
        "num_optimization_steps": job.iterations if own else None,
        **sequence_length_code(job.model),
    }
    made = f"{make}(pipe)" if own else f'{make}(pipe, method="{job.method}")'
    return "\n".join(
        [
            *imports,
            "",
            load,
            made,
            call("out = edit", "picture.png", **arguments),
            'out.images[0].save("edited.png")',
            "",
        ]
    )
