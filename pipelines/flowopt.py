"""FlowOpt: real pictures edited and inverted through a whole sampler, without training and without gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from trimtab.optim.solvers import StepSizeReport, estimate_step_size

from .families import stock_class
from .flowopt_output import FlowOptPipelineOutput, FlowOptState
from .flowopt_run import begin
from .flowopt_task import prepare_edit
from .sharing import SharedComponentsMixin

__all__ = ["FlowOptPipeline", "FlowOptPipelineMixin"]

_OF_THE_CALL = ("keep_history", "callback_on_iteration_end", "output_type", "return_dict")
Callback = Callable[[Any, int, FlowOptState], bool | None]


class FlowOptPipelineMixin(SharedComponentsMixin):
    """Makes a stock pipeline one that edits pictures: the call edits, `invert` finds a picture's noise.

    A class of pipelines is made by naming the mixin and the stock class, in this order:

        class FlowOptStableDiffusion3Pipeline(FlowOptPipelineMixin, StableDiffusion3Pipeline): ...

    The whole sampler, from the noise level where the edit starts to the clean latents, is one function f of its
    latents. With y the picture's latents and x_0 what an inverse scheduler finds under the source prompt,

        x_{k+1} = x_k - step_size (f(x_k) - y)                              (Eq. 6, the identity for the Jacobian)

    is iterated under the target prompt; z_k = f(x_k) are the edits, from the freest (k = 0, plain inversion and
    sampling) to ever closer to the source. Under the source prompt the same iteration inverts the picture.
    Source: O. Ronai, V. Kulikov, T. Michaeli, "FlowOpt: Fast Optimization Through Whole Flow Processes for
    Training-Free Editing" (arXiv:2510.22010). Beyond the paper: the iterate is float32 whatever the model's dtype,
    the step size is estimated, divergence ends a run, and the iteration is accelerated.

    The sampler is Euler's method where the pipeline's scheduler is one of a flow, and DDIM elsewhere, made from its
    config. The pipeline itself is left as it was; its text-to-image call is `pipe.generate`.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        source_prompt: str | Sequence[str] | None = "",
        *,
        strength: float = 0.8,
        num_inference_steps: int = 15,
        num_optimization_steps: int = 8,
        step_size: float | torch.Tensor | None = None,
        guidance_scale: float = 3.5,
        source_guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        acceleration: Literal["none", "anderson", "inverse"] = "none",
        locality: float | None = None,
        mask_image: Any = None,
        blend: Literal["feather", "poisson", "poisson-mixed", "none"] | None = None,
        selection: Literal["last"] | Callable[[torch.Tensor, list[Any]], torch.Tensor] = "last",
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        keep_history: bool = False,
        callback_on_iteration_end: Callback | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        solver_kwargs: dict[str, Any] | None = None,
        source_kwargs: dict[str, Any] | None = None,
        **pipeline_kwargs: Any,
    ) -> FlowOptPipelineOutput | tuple[Any, ...]:
        """Edits pictures.

        Args:
            image: a path, a PIL image, an array or a tensor (3, H, W) in [0, 1], or a list or a batch of them. It is
                scaled, in its proportions, to the number of pixels that the model is made for.
            prompt: what the edited picture shows; one for all pictures, or one each.
            source_prompt: what the picture shows now; blank inverts it without a description.
            strength: share of the schedule's steps that are run, in (0, 1]: how much may change at all.
            num_inference_steps: steps of the full schedule.
            num_optimization_steps: updates, >= 0: the more, the closer to the source.
            step_size: > 0, one for all pictures or (B,). None is half the theorem's bound, estimated from a near and a
                far pair at two passes (`estimate_step_size` takes more), and shared out among the updates of "none", so
                that the last iterate is still an edit; of "inverse" it is 1.
            guidance_scale: of the target prompt, in the usual convention where 1 is none.
            source_guidance_scale: of the source prompt.
            negative_prompt: what to guide away from, under the target prompt.
            acceleration: "none" is the paper's update. The others reach the source sooner, which an edit seldom wants:
                "anderson" extrapolates the update at the same cost; "inverse" inverts again each time, at two passes
                an iteration, and is by far the fastest.
            locality: > 0, keeps the edit to where it is: from the second iterate on, what differs from the source by
                well less than this share of the latents' deviation is drawn to the source, and what differs by more
                is not undone (`trimtab.pipelines.flowopt_locality`). 0.3 is a good value; None is the paper's method.
            mask_image: white where the picture may change, as `image` or one for all pictures; the rest is kept,
                pixel by pixel. None lets all of it change.
            blend: how the edit is set into the picture under a mask: "feather" fades it in from the mask's edge
                inwards; "poisson" sets its gradients in, so that tones meet at the mask's edge and no seam shows, and
                "poisson-mixed" the larger ones of edit and source, for edits that are smooth or see-through
                (`trimtab.pipelines.blending`); "none" leaves the decoded picture, whose rest is as good as the
                autoencoder; None is "feather".
            selection: which iterate is the result: "last", or a function of (images (B, 3, H, W), prompts) to scores
                (B,), the highest wins; a reward of `trimtab.rewards` is one. Never the least residual by itself:
                that is the source.
            height: of the result in pixels, together with `width`; the picture is cropped to their proportions.
            width: of the result in pixels.
            generator: of the pairs that the step size is estimated from; None is seed 0. Nothing else is random.
            keep_history: keep every iterate's latents, on the CPU.
            callback_on_iteration_end: called as (pipeline, iteration, state) after each; True ends the run there.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return a `FlowOptPipelineOutput`; a tuple otherwise.
            solver_kwargs: `memory`, `regularization`, `step_limit` and `tolerance` of `trimtab.optim.fixed_point`.
            source_kwargs: arguments of the stock call for the source prompt where they differ from those for the
                target, such as `prompt_embeds`.
            pipeline_kwargs: other arguments of the stock call, such as `max_sequence_length`.

        Returns:
            A `FlowOptPipelineOutput`.

        Raises:
            ValueError: an argument out of range, an unreadable picture, a scheduler that adds noise, or prompts of
                another number than pictures; before any model runs.
            TypeError: an argument of the wrong type, or one that the stock call doesn't have.
        """
        run = begin(
            self,
            image,
            prompt=prompt,
            source_prompt=source_prompt,
            strength=strength,
            num_inference_steps=num_inference_steps,
            num_optimization_steps=num_optimization_steps,
            step_size=step_size,
            guidance_scale=guidance_scale,
            source_guidance_scale=source_guidance_scale,
            negative_prompt=negative_prompt,
            acceleration=acceleration,
            locality=locality,
            mask_image=mask_image,
            blend=blend,
            selection=selection,
            height=height,
            width=width,
            generator=generator,
            solver_kwargs=solver_kwargs,
            source_kwargs=source_kwargs,
            output_type=output_type,
            **pipeline_kwargs,
        )
        return run.finish(
            keep_history=keep_history,
            callback=callback_on_iteration_end,
            output_type=output_type,
            return_dict=return_dict,
        )

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = "",
        *,
        num_inference_steps: int = 10,
        num_optimization_steps: int = 8,
        step_size: float | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        acceleration: Literal["none", "anderson", "inverse"] = "inverse",
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        keep_history: bool = False,
        callback_on_iteration_end: Callback | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        solver_kwargs: dict[str, Any] | None = None,
        **pipeline_kwargs: Any,
    ) -> FlowOptPipelineOutput | tuple[Any, ...]:
        """Finds the noise that the pipeline makes a picture of.

        The result's `latents`, given to `generate` or to the stock pipeline with the same prompt, steps and guidance
        scale and the same sampler, give `images` back. The chosen iterate is that of the least residual.

        Args:
            image: as for the call.
            prompt: what the picture shows.
            num_inference_steps: steps of the sampler.
            num_optimization_steps: updates, >= 0.
            step_size: as for the call, but half the bound is each update's.
            guidance_scale: of the prompt, in the usual convention where 1 is none.
            negative_prompt: what to guide away from.
            acceleration: as for the call.
            height: as for the call.
            width: as for the call.
            generator: as for the call.
            keep_history: as for the call.
            callback_on_iteration_end: as for the call.
            output_type: of the reconstructions.
            return_dict: as for the call.
            solver_kwargs: as for the call.
            pipeline_kwargs: other arguments of the stock call.

        Returns:
            A `FlowOptPipelineOutput` whose `latents` are the noise.

        Raises:
            ValueError: as for the call.
            TypeError: as for the call.
        """
        run = begin(
            self,
            image,
            prompt=prompt,
            source_prompt=None,
            strength=1.0,
            num_inference_steps=num_inference_steps,
            num_optimization_steps=num_optimization_steps,
            step_size=step_size,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            acceleration=acceleration,
            selection=None,
            inversion=True,
            height=height,
            width=width,
            generator=generator,
            solver_kwargs=solver_kwargs,
            output_type=output_type,
            **pipeline_kwargs,
        )
        return run.finish(
            keep_history=keep_history,
            callback=callback_on_iteration_end,
            output_type=output_type,
            return_dict=return_dict,
        )

    def stream(self, image: Any, prompt: str | Sequence[str] | None = None, **options: Any) -> Iterator[FlowOptState]:
        """Edits pictures and gives each iterate as soon as it is there: stop whenever you like it.

        Args:
            image: as for the call.
            prompt: as for the call.
            options: keyword arguments of the call but `keep_history`, `callback_on_iteration_end`, `output_type` and
                `return_dict`. They are checked, and the prompts encoded, before this returns.

        Returns:
            An iterator of states. The pictures of a state are decoded when its `images` is read.

        Raises:
            ValueError: as for the call.
            TypeError: as for the call.
        """
        for name in _OF_THE_CALL:
            if name in options:
                raise TypeError(f"`{name}` is an argument of the call, not of `stream`")
        with torch.no_grad():
            return iter(begin(self, image, prompt=prompt, **{**_edit_defaults(), **options}))

    @torch.no_grad()
    def estimate_step_size(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        source_prompt: str | Sequence[str] | None = "",
        *,
        strength: float = 0.8,
        num_inference_steps: int = 15,
        guidance_scale: float = 3.5,
        source_guidance_scale: float = 1.0,
        local_points: int = 3,
        global_points: int = 2,
        local_scale: float = 0.05,
        quantile: float = 0.1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> StepSizeReport:
        """The bound of the convergence theorem for an edit, from sampled pairs: `trimtab.optim.estimate_step_size`.

        Args:
            image: as for the call, like the arguments up to `source_guidance_scale`.
            prompt: as for the call.
            source_prompt: as for the call.
            strength: as for the call.
            num_inference_steps: as for the call.
            guidance_scale: as for the call.
            source_guidance_scale: as for the call.
            local_points: near points, one pass through f each.
            global_points: far points, one pass through f each.
            local_scale: distance of near points, relative to the latents' deviation.
            quantile: of the positive ratios that is the bound.
            generator: of the points; None is seed 0.
            options: further arguments of the call that say what f is, such as `height` or `negative_prompt`.

        Returns:
            The report. A run takes half its bound.

        Raises:
            ValueError: as for the call.
            TypeError: as for the call.
        """
        task = prepare_edit(
            self,
            image,
            prompt,
            source_prompt,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            source_guidance_scale=source_guidance_scale,
            **options,
        )
        try:
            return estimate_step_size(
                task.flow,
                task.inverted(task.target),
                local_points=local_points,
                global_points=global_points,
                local_scale=local_scale,
                quantile=quantile,
                generator=generator,
            )
        finally:
            task.release()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The stock pipeline's own text-to-image call."""
        return stock_class(self).__call__(self, *args, **kwargs)


def _edit_defaults() -> dict[str, Any]:
    """The call's keyword arguments that say what is done, with their defaults."""
    parameters = inspect.signature(FlowOptPipelineMixin.__call__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in ("prompt", *_OF_THE_CALL)
    }


class FlowOptPipeline:
    """Picks the family's class: `FlowOptPipeline.from_pipe(stock)` or `FlowOptPipeline.from_pretrained(model)`.

    Example:
        >>> edit = FlowOptPipeline.from_pretrained(model)                                       # doctest: +SKIP
        >>> edit(image="cat.png", source_prompt="a cat", prompt="a dog").images[0]              # doctest: +SKIP
    """

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """An editing pipeline of the components of a pipeline in memory, which are shared.

        Args:
            pipeline: a stock text-to-image pipeline, or a subclass of one.
            kwargs: as for Diffusers' `from_pipe`.

        Raises:
            ValueError: if there is no editing pipeline for its family.
        """
        import trimtab.pipelines as package

        name = f"FlowOpt{stock_class(pipeline).__name__}"
        if name not in package._FLOWOPT:
            takes = ", ".join(known.removeprefix("FlowOpt") for known in package._FLOWOPT)
            raise ValueError(f"`pipeline` is a {type(pipeline).__name__}, which isn't edited here; takes {takes}")
        return getattr(package, name).from_pipe(pipeline, **kwargs)

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> Any:
        """An editing pipeline of a repository or folder of a stock pipeline.

        Args:
            model: as for Diffusers' `from_pretrained`, like `kwargs`.
            kwargs: such as `dtype`.

        Raises:
            ValueError: if there is no editing pipeline for its family.
        """
        return cls.from_pipe(DiffusionPipeline.from_pretrained(model, **kwargs))
