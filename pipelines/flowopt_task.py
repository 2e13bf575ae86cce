"""What every way of editing a picture starts from: its latents, and the flow between them and noise."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from trimtab.schedulers import start_at

from .arguments import checked_count, checked_scale, number_of_prompts
from .families import denoisers_of, family_of, size_multiple
from .flowopt_mask import MaskedPath, latent_mask
from .flowopt_schedules import inverse_of, sampler_of
from .generation_map import GenerationMap
from .images import fit_images, fitted_size, load_images, load_masks, size_of_batch
from .stock_call import stock_arguments

__all__ = ["EditTask", "conditioned_map", "counted", "prepare_edit", "steps_of"]


@dataclass(frozen=True)
class EditTask:
    """Pictures, their latents, and the maps between noise at the level of the start and clean latents.

    Attributes:
        pipe: the pipeline.
        pictures: (B, 3, H, W) float32 in [0, 1] on the CPU, as the model gets them.
        target: (B, *latent_shape) float32, their latents y.
        sample: latents at the start's level to clean ones under the target prompt, f(x; target).
        invert: clean latents to those at the start's level under the source prompt.
        prompts: the target prompts, one a picture.
        start: steps of the schedule that are left out at its noisy end.
        mask: (B, 1, H, W) float32 in [0, 1] on the CPU, 1 where the pictures may change; None is everywhere.
        path: keeps the rest of the latents on the source's path.
        calls: evaluations of the denoiser a picture so far, a guided step counting two; filled by `counted`.
        on_step: is told the number of a step and the clean latents that it expects, by methods that know them.
    """

    pipe: Any
    pictures: torch.Tensor
    target: torch.Tensor
    sample: GenerationMap
    invert: GenerationMap
    prompts: list[str | None]
    start: int
    mask: torch.Tensor | None = None
    path: MaskedPath | None = None
    calls: dict[str, int] = field(default_factory=lambda: {"rows": 0})
    on_step: Callable[[int, torch.Tensor], None] | None = None

    @property
    def num_function_evaluations(self) -> int:
        """Evaluations of the denoiser a picture so far."""
        return round(self.calls["rows"] / len(self.pictures))

    def flow(self, x: torch.Tensor) -> torch.Tensor:
        """f(x): the rest of the sampling from the start's level under the target prompt, float32, counted."""
        with counted(self.pipe, self.calls):
            return self.sample(x)

    def inverted(self, latents: torch.Tensor) -> torch.Tensor:
        """What the inverse scheduler finds at the start's level for clean latents under the source prompt, counted."""
        with counted(self.pipe, self.calls):
            x = self.invert(latents)
        if self.path is not None and self.path.reference is None:
            self.keep_outside(x)
        return x

    def keep_outside(self, x: torch.Tensor) -> None:
        """From here on the sampler keeps what is outside of the mask, if there is one, on the way from x to y."""
        if self.path is not None:
            self.path.reference = x

    def release(self) -> None:
        """Lets an offloading pipeline take its models off the device."""
        self.pipe.maybe_free_model_hooks()


def prepare_edit(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str] | None,
    source_prompt: str | Sequence[str] | None = None,
    *,
    strength: float = 1.0,
    num_inference_steps: int = 15,
    guidance_scale: float = 1.0,
    source_guidance_scale: float = 1.0,
    negative_prompt: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    mask_image: Any = None,
    local: bool = False,
    source_kwargs: dict[str, Any] | None = None,
    **pipeline_kwargs: Any,
) -> EditTask:
    """Checks an edit's arguments, encodes its prompts once and its pictures, and makes its maps.

    Args:
        pipe: a pipeline of a family in the table.
        image: what `trimtab.pipelines.images.load_images` takes.
        prompt: what the edited pictures show: one for all, or one a picture.
        source_prompt: what the pictures show. None is `prompt`, with the encoding shared: for an inversion.
        strength: share of the schedule's steps that are run, in (0, 1].
        num_inference_steps: steps T of the full schedule.
        guidance_scale: of the target prompt, in the usual convention, where 1 is no guidance.
        source_guidance_scale: of the source prompt.
        negative_prompt: what to guide away from.
        height: of the result in pixels, together with `width`; None is by the rule of `size_of_batch`.
        width: of the result in pixels.
        mask_image: what `trimtab.pipelines.images.load_masks` takes; None lets all of the picture change.
        local: whether the task has a path although there is no mask, for masks that are found on the way.
        source_kwargs: arguments of the stock call for the source prompt where they differ from those for the target,
            such as `prompt_embeds`.
        pipeline_kwargs: other arguments of the stock call, such as `max_sequence_length`.

    Returns:
        The task.

    Raises:
        ValueError: an argument out of range, a scheduler that adds noise, pictures that cannot be read, or prompts
            of another number than pictures; before any model runs.
        TypeError: an argument of the wrong type, or one that the stock call doesn't have.
    """
    sampler = sampler_of(pipe.scheduler)
    steps = checked_count("num_inference_steps", num_inference_steps)
    start = steps - steps_of(strength, steps)
    checked_scale("guidance_scale", guidance_scale)
    checked_scale("source_guidance_scale", source_guidance_scale)
    multiple = size_multiple(pipe)
    for name, size in (("height", height), ("width", width)):
        if size is not None and checked_count(name, size) % multiple:
            raise ValueError(f"`{name}` is {size}; takes a multiple of {multiple} for this model")
    if (height is None) != (width is None):
        raise ValueError(f"`height` is {height} and `width` is {width}; takes both or none")
    same = source_prompt is None and source_kwargs is None
    source_kwargs = pipeline_kwargs | (source_kwargs or {})
    prompts = _texts("prompt", prompt, pipeline_kwargs)
    sources = prompts if same else _texts("source_prompt", source_prompt, source_kwargs)
    images = load_images(image)
    for picture in images if height is None else []:
        fitted_size(picture.size, 1, multiple)
    for name, texts in (("prompt", prompts), ("source_prompt", sources)):
        if len(texts) not in (1, len(images)):
            raise ValueError(
                f"`{name}` has {len(texts)} prompts for {len(images)} pictures; takes one, or one a picture"
            )

    shared = {"num_inference_steps": steps, "scheduler": sampler}
    path = None
    masks = None if mask_image is None else load_masks(mask_image, images)
    if local or masks is not None:
        path = MaskedPath(pipeline_kwargs.get("callback_on_step_end"))
        pipeline_kwargs = pipeline_kwargs | {"callback_on_step_end": path}
    of_target = conditioned_map(
        pipe, prompt, guidance_scale, negative_prompt, height=height, width=width, **shared, **pipeline_kwargs
    )
    width, height = size_of_batch(images, of_target.height * of_target.width, multiple, height=height, width=width)
    if (height, width) != (of_target.height, of_target.width):
        of_target = of_target.replaced(height=height, width=width)
    of_source = of_target
    if not same:
        of_source = conditioned_map(
            pipe, source_prompt, source_guidance_scale, None, height=height, width=width, **shared, **source_kwargs
        )
    pictures = fit_images(images, (width, height))
    sample = of_target.replaced(scheduler=start_at(sampler, start))
    invert = of_source.replaced(scheduler=start_at(inverse_of(sampler), start))
    sample.offload_after_call = invert.offload_after_call = False
    target = of_target.encode(pictures.to(pipe._execution_device)).float()
    pipe.maybe_free_model_hooks()
    mask = None
    if masks is not None:
        mask = fit_images(masks, (width, height), Image.Resampling.BOX).mean(1, keepdim=True)
        factor = getattr(pipe, of_target.family.scale_factor)
        path.mask = latent_mask(mask, of_target.family, of_target.latent_shape, factor)
        path.target = target
    prompts = prompts * (len(images) // len(prompts))
    return EditTask(pipe, pictures, target, sample, invert, prompts, start, mask, path)


def conditioned_map(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    guidance_scale: float,
    negative_prompt: str | Sequence[str] | None,
    **options: Any,
) -> GenerationMap:
    """A map to latents whose guidance scale is in the usual convention: 1 is no guidance, in every family.

    Args:
        pipe: a pipeline of a family in the table.
        prompt: as for `GenerationMap`.
        guidance_scale: w in uncond + w (cond - uncond), >= 0, or of a distilled model what the network gets.
        negative_prompt: None is a blank one where the pipeline guides only if it has one.
        options: further arguments of `GenerationMap`.
    """
    family = family_of(pipe)
    scale = checked_scale("guidance_scale", guidance_scale)
    if family.guidance_argument == "true_cfg_scale" and scale > 1 and negative_prompt is None:
        negative_prompt = " "
    if negative_prompt is not None and "negative_prompt" not in stock_arguments(pipe):
        raise ValueError(f"`negative_prompt` is given; {type(pipe).__name__} takes none")
    scale = max(0.0, scale + family.guidance.scale_offset)
    return GenerationMap(
        pipe, prompt, negative_prompt=negative_prompt, guidance_scale=scale, output="latent", **options
    )


def steps_of(strength: float, steps: int) -> int:
    """How many of a schedule's steps a strength stands for: the nearest whole number, at least 1.

    Example:
        >>> steps_of(0.8, 15), steps_of(0.01, 15)
        (12, 1)

    Raises:
        TypeError: `strength` is no number.
        ValueError: it is not in (0, 1].
    """
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real):
        raise TypeError(f"`strength` is a {type(strength).__name__}; takes a number")
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` is {strength}; takes a number in (0, 1]")
    return max(1, math.floor(strength * steps + 0.5))


@contextmanager
def counted(pipe: Any, calls: dict[str, int]) -> Iterator[None]:
    """Adds the rows that the denoisers of `pipe` get inside to `calls["rows"]`."""

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        calls["rows"] += len(first)

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in denoisers_of(pipe)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _texts(name: str, prompt: Any, arguments: dict[str, Any] | None = None) -> list[Any]:
    """The prompts as a list; as many None where they are given as embeddings."""
    try:
        number = number_of_prompts(prompt, arguments or {})
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`prompt`", f"`{name}`")) from None
    if prompt is None:
        return [None] * number
    return [prompt] if isinstance(prompt, str) else list(prompt)
