"""One call of a stock pipeline under a guidance rule, shared by the commands."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from trimtab.commands.errors import UsageError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["check_guidance", "guidance_names", "sample"]


def guidance_names() -> list[str]:
    """The names that ``--guidance`` takes: ``cfg``, the pipeline's own, and those of ``trimtab.guidance``."""
    return list(_NAMES)


# Written out, as reading them from trimtab.guidance imports Diffusers' guiders: most of the app's start.
_NAMES = (
    "cfg", "apg", "autoguidance", "cfg++", "cfg-zero", "fdg", "interval", "mambo-g", "pag", "rescale", "seg", "slg",
    "tcfg",
)  # fmt: skip
_SCALES = {"apg": 10.0, "autoguidance": 2.0, "cfg++": 0.6, "fdg": 10.0, "mambo-g": 10.0}
"""Scales where none is given, of the rules whose scale means something else than plain guidance's."""


def check_guidance(name: str, guidance_scale: float | None = None) -> float:
    """Makes sure that there is a guidance rule of this name and that it takes this scale.

    Args:
        name: one of :func:`guidance_names`, or a .json file that ``trimtab tune`` wrote.
        guidance_scale: None is the rule's own default.

    Returns:
        The scale.

    Raises:
        UsageError: if not.
    """
    if name.endswith(".json"):
        return _tuned_scale(name, guidance_scale)
    names = guidance_names()
    if name not in names:
        raise UsageError(f"--guidance takes one of {', '.join(names)}; got {name!r}")
    if guidance_scale is None:
        return _SCALES.get(name, 7.5)
    if name != "cfg":
        from trimtab.guidance import make_guider

        try:
            make_guider(name, guidance_scale)
        except ValueError as error:
            raise UsageError(f"--guidance {name} refuses --guidance-scale: {first_line(error)}") from None
    return guidance_scale


def _tuned_scale(path: str, guidance_scale: float | None) -> float:
    from trimtab.guidance import TunedPreset

    try:
        stated = TunedPreset.load(path).guidance.get("guidance_scale", 7.5)
    except (OSError, ValueError) as error:
        raise UsageError(f"--guidance: {first_line(error)}") from None
    return stated if guidance_scale is None else guidance_scale


def guidance_arguments(
    pipe: Any, guidance: str, guidance_scale: float, negative_prompt: str | None = None
) -> dict[str, Any]:
    """Arguments of a stock call that set its guidance, under the names that they have there.

    Args:
        pipe: a text-to-image pipeline.
        guidance: a name of :func:`guidance_names`. But for "cfg" its rule is attached to the pipeline besides: the
            arguments only switch the second prediction on.
        guidance_scale: >= 0, in the usual convention where 1 is none.
        negative_prompt: what to guide away from.

    Raises:
        NotImplementedError: the pipeline is of no known family.
        ValueError: the same.
    """
    from trimtab.pipelines.families import family_of

    if guidance == "cfg":
        family = family_of(pipe)
        strength, scale = family.guidance_argument, guidance_scale + family.guidance.scale_offset
    else:
        takes = inspect.signature(pipe.__call__).parameters
        strength = "true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"
        scale = max(guidance_scale, 2.0)
    if strength == "true_cfg_scale" and negative_prompt is None:
        negative_prompt = " "  # with None such a pipeline makes no second prediction, whatever the scale
    given = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    return {strength: float(scale), **given}


def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: str,
    guidance_scale: float,
    steps: int,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    on_step: Callable[..., dict[str, Any]] | None = None,
) -> "list[Image]":
    """Pictures of prompts, one a seed. Each has a generator of its own, so its neighbours do not matter.

    Args:
        pipe: a text-to-image pipeline.
        prompts: one a picture.
        seeds: one a picture.
        guidance: a name of :func:`guidance_names`.
        guidance_scale: >= 0.
        steps: >= 1, the scheduler's steps.
        height: in pixels; None is the pipeline's own, as for ``width``.
        width: in pixels.
        negative_prompt: what to guide away from, for all pictures.
        on_step: a ``callback_on_step_end`` of the pipeline's; what it raises goes through.

    Returns:
        The pictures.

    Raises:
        UsageError: if the pipeline refuses an argument.
        FloatingPointError: if a picture is not finite.
        MemoryError: if the device's memory is too small for so many at once.
    """
    import numpy as np
    import torch

    from trimtab.pipelines.vocabulary import word_level_tokenizers

    takes = inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {"height": height, "width": width, "callback_on_step_end": on_step}
    rule: AbstractContextManager[Any] = nullcontext()
    try:
        if guidance != "cfg":
            from trimtab.guidance import attach, make_guider

            rule = attach(pipe, make_guider(guidance, guidance_scale, pipe))
        options |= guidance_arguments(pipe, guidance, guidance_scale, negative_prompt)
    except (NotImplementedError, ValueError) as error:
        raise UsageError(f"--guidance {guidance} does not go with this model: {first_line(error)}") from error
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(prompts)
    if word_level_tokenizers(pipe) and "max_sequence_length" in takes:
        options["max_sequence_length"] = 16  # a caption of such a model is shorter; the default is padding
    options = {name: value for name, value in options.items() if value is not None}
    if refused := [name for name in options if name not in takes]:
        raise UsageError(f"{type(pipe).__name__} takes no {' and no '.join(refused)}")

    try:
        with rule:
            arrays = pipe(
                prompt=list(prompts),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=steps,
                output_type="np",
                **options,
            ).images
    except ValueError as error:
        raise UsageError(f"{type(pipe).__name__} refuses this call: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{len(prompts)} pictures at once are too many: {first_line(error)}") from error
    if not np.isfinite(arrays).all():
        raise FloatingPointError(
            f"a picture is not finite at {guidance} {guidance_scale:g}: lower it or take --dtype float32"
        )
    return pipe.image_processor.numpy_to_pil(arrays)
