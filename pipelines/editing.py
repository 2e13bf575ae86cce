"""Editing pictures by any of the published methods that need nothing of a model but its flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput

from .arguments import checked_generators
from .edit_methods import METHODS, EditMethod
from .families import family_of
from .flowopt_mask import check_blend, set_in
from .flowopt_output import as_output_type
from .flowopt_task import prepare_edit

__all__ = ["EditPipeline", "EditPipelineOutput"]

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class EditPipelineOutput(BaseOutput):
    """The result of an edit.

    Attributes:
        images: the pictures, as `output_type` says.
        latents: (B, *latent_shape) float32, clean latents of `images`.
        num_function_evaluations: evaluations of the denoiser a picture, a guided step counting two.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor
    num_function_evaluations: int


class EditPipeline:
    """Edits real pictures with a stock text-to-image pipeline, without training and without gradients.

    The methods, of `trimtab.pipelines.edit_methods`, share their arguments and count their evaluations alike:

    - "sdedit": noise on the picture, and sampling from there. arXiv 2108.01073.
    - "ode-inversion": Euler's or DDIM's inversion, and sampling.
    - "uni-inv": Uni-Inv's inversion, and sampling. arXiv 2504.13109.
    - "rf-solver": the midpoint rule in both directions. arXiv 2411.04746.
    - "fireflow": the midpoint rule at one call a step. arXiv 2412.07517.
    - "rf-inversion": both directions steered, with `gamma`, `eta`, `stop` and `decay`. arXiv 2410.10792.
    - "flowedit": along the difference of two velocities, with `n_avg` and `n_min`. arXiv 2412.08629.

    The sampler is Euler's method where the pipeline's scheduler is one of a flow, and DDIM elsewhere, where "sdedit"
    and "ode-inversion" work. The pipeline is left as it was.

    Args:
        pipe: a stock pipeline for pictures of a family in the table, or an instance of a subclass of one.
        method: one of those above.

    Attributes:
        pipe: the pipeline.
        method: the method.

    Raises:
        ValueError: an unknown method, a pipeline of no known family, or one for videos.

    Example:
        >>> edit = EditPipeline.from_pretrained(model, method="flowedit")                         # doctest: +SKIP
        >>> edit(image="cat.png", source_prompt="a cat", prompt="a dog").images[0]                # doctest: +SKIP
    """

    def __init__(self, pipe: DiffusionPipeline, method: str = "flowedit") -> None:
        if family_of(pipe).video:
            raise ValueError(f"`pipe` is a {type(pipe).__name__}, which makes videos; takes one that makes pictures")
        _method_of(method)
        self.pipe = pipe
        self.method = method

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, method: str = "flowedit") -> EditPipeline:
        """An editing pipeline around one in memory; as the class itself, in the words of Diffusers."""
        return cls(pipeline, method)

    @classmethod
    def from_pretrained(cls, model: str, method: str = "flowedit", **kwargs: Any) -> EditPipeline:
        """An editing pipeline of a repository or folder of a stock pipeline.

        Args:
            model: as for Diffusers' `from_pretrained`, like `kwargs`.
            method: as for the class.
            kwargs: such as `dtype`.
        """
        return cls(DiffusionPipeline.from_pretrained(model, **kwargs), method)

    def to(self, *args: Any, **kwargs: Any) -> EditPipeline:
        """Moves the pipeline, as in Diffusers."""
        self.pipe.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        source_prompt: str | Sequence[str] | None = "",
        *,
        strength: float = 0.8,
        num_inference_steps: int = 15,
        guidance_scale: float = 3.5,
        source_guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        mask_image: Any = None,
        blend: Literal["feather", "poisson", "poisson-mixed", "none"] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        method_kwargs: dict[str, Any] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        source_kwargs: dict[str, Any] | None = None,
        callback_on_estimate: Callable[[int, Callable[[], torch.Tensor]], None] | None = None,
        **pipeline_kwargs: Any,
    ) -> EditPipelineOutput | tuple[Any, ...]:
        """Edits pictures.

        Args:
            image: a path, a PIL image, an array or a tensor (3, H, W) in [0, 1], or a list or a batch of them. It is
                scaled, in its proportions, to the number of pixels that the model is made for.
            prompt: what the edited picture shows; one for all pictures, or one each.
            source_prompt: what the picture shows now.
            strength: share of the schedule's steps that are run, in (0, 1]: how much may change.
            num_inference_steps: steps of the full schedule.
            guidance_scale: of the target prompt, in the usual convention where 1 is none.
            source_guidance_scale: of the source prompt; FlowEdit's authors take about a quarter of the target's.
            negative_prompt: what to guide away from, under the target prompt.
            height: of the result in pixels, together with `width`; the picture is cropped to their proportions.
            width: of the result in pixels.
            mask_image: white where the picture may change, as `image` or one for all pictures. While the sampler runs,
                the latents of the rest follow the source's own way from noise to picture; the rest of the result is
                the picture's own, of "latent" results the picture's latents.
            blend: how the edit is set into the picture under a mask, as for `FlowOptPipeline`: None is "feather".
            generator: of the noise that the method draws, if it does: one, or one for each picture, which then doesn't
                depend on the others. None is seed 0.
            method_kwargs: the method's own options.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an `EditPipelineOutput`; a tuple otherwise.
            source_kwargs: arguments of the stock call for the source prompt where they differ from those for the
                target, such as `prompt_embeds`.
            callback_on_estimate: is called after each step of FlowEdit and of RF-Inversion, whose two directions are
                counted on, with its number, from 0, and a function that gives the pictures where the edit would end if
                the velocities stayed as they are, (B, 3, H, W) float32 in [0, 1] on the CPU. What it raises ends the
                edit. The other methods don't call it: their sampling reports to the stock call's
                `callback_on_step_end`.
            pipeline_kwargs: other arguments of the stock call, such as `max_sequence_length`.

        Returns:
            An `EditPipelineOutput`.

        Raises:
            ValueError: an argument out of range, an unreadable picture, a scheduler that adds noise or that the method
                is not for, or prompts of another number than pictures.
            TypeError: an argument of the wrong type, or an option that the method or the stock call doesn't have.
        """
        method = _method_of(self.method)
        options = method.options | (method_kwargs or {})
        for name in options:
            if name not in method.options:
                takes = ", ".join(method.options) or "none"
                raise TypeError(f"`method_kwargs` has `{name}`; {self.method!r} takes {takes}")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; takes one of {', '.join(_OUTPUT_TYPES)}")
        check_blend(blend)
        task = prepare_edit(
            self.pipe,
            image,
            prompt,
            source_prompt if method.uses_source_prompt else None,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            source_guidance_scale=source_guidance_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            mask_image=mask_image,
            source_kwargs=source_kwargs if method.uses_source_prompt else None,
            **pipeline_kwargs,
        )
        if method.flow_only and not isinstance(task.sample.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"`method` is {self.method!r}, which is for flows; takes 'sdedit' or 'ode-inversion' for "
                f"{type(self.pipe).__name__} with {type(self.pipe.scheduler).__name__}"
            )
        if callback_on_estimate is not None:

            def on_step(step: int, latents: torch.Tensor) -> None:
                callback_on_estimate(step, lambda: task.sample.decode(latents).float().cpu())

            task = dataclasses.replace(task, on_step=on_step)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        try:
            latents = method.run(task, checked_generators(generator, len(task.target)), **options)
            images: Any = latents
            if output_type != "latent":
                images = task.sample.decode(latents).float().cpu()
                images = as_output_type(set_in(images, task.pictures, task.mask, blend), output_type)
        finally:
            task.release()
        output = EditPipelineOutput(images, latents, task.num_function_evaluations)
        return output if return_dict else output.to_tuple()


def _method_of(name: str) -> EditMethod:
    if name not in METHODS:
        raise ValueError(f"`method` is {name!r}; takes one of {', '.join(METHODS)}")
    return METHODS[name]
