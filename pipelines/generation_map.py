"""A stock pipeline and its conditioning as one function of the noise."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from .arguments import (
    check_images,
    check_latents,
    checked_count,
    checked_generators,
    checked_negative,
    checked_scale,
    checked_size,
    noise_states,
    number_of_prompts,
    prompt_rows,
)
from .families import denoisers_of, family_of, size_multiple
from .gradients import checkpointed, frozen
from .latents import decode_latents, encode_images
from .stock_call import draw_latents, for_rows, prepare, run_loop, stock_arguments
from .vocabulary import warn_of_unknown_words

__all__ = ["GenerationMap"]

_OURS = ("latents", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")


class GenerationMap:
    """What a pipeline makes of its noise: f(latents) = pictures, everything else held fixed.

    The map runs the stock pipeline's own loop, with the prompt encoded once, here. It is deterministic,
    treats the rows of a batch independently, and is differentiable: where latents require a gradient and
    gradients are enabled, `f(latents)` has one, and otherwise nothing is recorded. A call leaves the pipeline
    as it found it: no attribute, no progress bar, no gradient of a parameter. A guidance rule attached to the
    pipeline (`trimtab.guidance.attach`) acts in its maps too. Like the pipeline itself, a map is not meant for
    two threads at once. Second derivatives exist where attention isn't fused
    (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`).

    Args:
        pipe: a pipeline of a family in `trimtab.pipelines.FAMILIES`, or of a subclass of such a class; the
            stock class's call is what runs.
        prompt: one prompt for all rows of a batch, or one for each row. None where `pipeline_kwargs` has
            `prompt_embeds` and what belongs to them.
        negative_prompt: the same for the negative prompt; None leaves it to the pipeline.
        guidance_scale: the pipeline's guidance scale, in its own convention, under whatever name it has there
            (`true_cfg_scale` for Qwen-Image); finite, >= 0. None is the pipeline's default.
        num_inference_steps: steps of the loop, >= 1. None is the pipeline's default.
        height: of the pictures in pixels. None is the pipeline's default.
        width: of the pictures in pixels. None is the pipeline's default.
        output: what a call returns: "image" or "latent".
        scheduler: runs in place of the pipeline's scheduler, which comes back after each call.
        generator: of the noise that a stochastic scheduler adds within the loop, the same at every call and,
            from one generator, in every row; a list has one for each prompt. Only its state at this moment
            counts, and it isn't advanced. None is seed 0.
        gradient_checkpointing: calls that record a gradient keep each step's input alone and compute the step
            again in the backward pass: one step's memory for any number of steps, for one more forward pass.
        pipeline_kwargs: other arguments of the stock call, such as `max_sequence_length`.

    Attributes:
        pipe: the pipeline.
        family: its entry in the table of families.
        scheduler: the one that runs, or None for whatever `pipe.scheduler` is at the call.
        height: of the pictures in pixels.
        width: of the pictures in pixels.
        image_shape: of one sample's picture, (3, height, width), or (frames, 3, height, width) of a video.
        latent_shape: of one sample's latents as the pipeline takes them: (C, h, w), (C, frames, h, w) of a video,
            or (tokens, channels).
        num_prompts: how many prompts it holds: 1 for any batch, or the batch's size.
        output: what a call returns.
        gradient_checkpointing: whether calls with a gradient compute the steps twice.
        offload_after_call: whether models that offloading brought to the device leave it after each call. Where
            many calls follow one another, set it to False and call `pipe.maybe_free_model_hooks()` at the end.

    Raises:
        ValueError: for a value out of range; the message names the argument.
        TypeError: for an argument that the stock call hasn't, or that is the map's own.

    Example:
        >>> f = GenerationMap(pipe, "a cat", num_inference_steps=20)                # doctest: +SKIP
        >>> z = f.sample_latents(4, torch.Generator().manual_seed(0))               # doctest: +SKIP
        >>> f(z.requires_grad_()).mean().backward()      # z.grad: float32, like z  # doctest: +SKIP
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output: Literal["image", "latent"] = "image",
        scheduler: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        gradient_checkpointing: bool = True,
        **pipeline_kwargs: Any,
    ) -> None:
        self.family = family_of(pipe)
        self.pipe = pipe
        self.scheduler = scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.offload_after_call = True
        if output not in ("image", "latent"):
            raise ValueError(f"`output` is {output!r}; takes 'image' or 'latent'")
        self.output = output

        known = stock_arguments(pipe)
        for name in pipeline_kwargs:
            if name in _OURS:
                raise TypeError(f"`{name}` is set by GenerationMap itself and can't be passed")
            if name not in known:
                raise TypeError(f"`{name}` is no argument of {type(pipe).__name__}; takes {', '.join(known)}")
        arguments = dict(pipeline_kwargs)
        # Binning would swap the size asked for against another one and resize the picture afterwards.
        if "use_resolution_binning" in known and arguments.setdefault("use_resolution_binning", False):
            raise ValueError("`use_resolution_binning` is True; takes False: the size is the one asked for")
        if guidance_scale is not None:
            name = self.family.guidance_argument
            if name in arguments:
                raise ValueError(f"`guidance_scale` and `{name}` are both given; takes one of them")
            arguments[name] = checked_scale("guidance_scale", guidance_scale)
        if num_inference_steps is not None:
            arguments["num_inference_steps"] = checked_count("num_inference_steps", num_inference_steps)
        for name, size in (("height", height), ("width", width)):
            if size is not None:
                arguments[name] = checked_size(name, size, size_multiple(pipe))
        self.num_prompts = number_of_prompts(prompt, arguments)
        if prompt is not None:
            arguments["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        if negative_prompt is not None:
            if "negative_prompt" not in known:
                raise ValueError(f"`negative_prompt` is given; {type(pipe).__name__} takes none")
            arguments["negative_prompt"] = checked_negative(negative_prompt, prompt, self.num_prompts)
        elif "negative_prompt_embeds" in arguments and "negative_prompt" in known:
            arguments["negative_prompt"] = None  # some pipelines' default is "", which would be a second one
        warn_of_unknown_words(pipe, arguments)
        self._arguments = arguments
        self._noise = noise_states(generator, self.num_prompts)
        self._upcast: Any = None
        if self._current_scheduler().config.get("stochastic_sampling", False):
            raise ValueError("`scheduler` has stochastic_sampling, noise that no generator controls; takes False")

        if output == "image":
            self._autoencoder()

        try:
            self._preparation = prepare(pipe, self._current_scheduler(), arguments)
        finally:
            pipe.maybe_free_model_hooks()
        self.height = int(self._preparation.latents["height"])
        self.width = int(self._preparation.latents["width"])
        for name, size in (("height", height), ("width", width)):
            if size not in (None, getattr(self, name)):  # one of the two alone is ignored by some pipelines
                raise ValueError(f"`{name}` is {size}, which {type(pipe).__name__} ignores alone; pass both sizes")
        frames = self._preparation.latents.get("num_frames")
        self.image_shape = (3, self.height, self.width) if frames is None else (frames, 3, self.height, self.width)
        self.latent_shape = tuple(self.sample_latents(1, torch.Generator()).shape[1:])

    def __call__(self, latents: torch.Tensor, *, prompt_index: Sequence[int] | None = None) -> torch.Tensor:
        """Runs the pipeline from these latents.

        Args:
            latents: (B, *latent_shape), finite, floating; standard normal noise, unless the scheduler starts
                later. They are cast to what the pipeline computes in.
            prompt_index: for each row, which of the prompts it has. None is row i with prompt i, or the only
                prompt for all rows.

        Returns:
            (B, *image_shape) in [0, 1] for output "image", the shape of `latents` for "latent"; dtype and device
            of `latents`.

        Raises:
            ValueError: for latents of the wrong shape or with a non-finite value, or a wrong `prompt_index`.
            TypeError: for latents that are no floating tensor.
        """
        check_latents(latents, self.latent_shape)
        index = prompt_rows(prompt_index, len(latents), self.num_prompts)
        differentiable = torch.is_grad_enabled() and latents.requires_grad
        try:
            with torch.set_grad_enabled(differentiable):
                result = self._run(latents, index, differentiable)
                if self.output == "image":
                    result = self._decode(result)
                return result.to(latents.device, latents.dtype)
        finally:
            if not differentiable and self.offload_after_call:
                self.pipe.maybe_free_model_hooks()

    def replaced(self, *, scheduler: Any = None, height: int | None = None, width: int | None = None) -> GenerationMap:
        """The same map under another scheduler or at another size; the prompt isn't encoded again.

        Args:
            scheduler: runs in place of the present one. None keeps it.
            height: of the pictures in pixels, together with `width`. None keeps it.
            width: of the pictures in pixels.

        Returns:
            A new map that shares the pipeline and the encodings.

        Raises:
            ValueError: a size that the model doesn't take, or one of the two sizes alone.
        """
        other = copy.copy(self)
        if scheduler is not None:
            other.scheduler = scheduler
        if height is None and width is None:
            return other
        if height is None or width is None:
            raise ValueError(f"`height` is {height} and `width` is {width}; takes both or none")
        multiple = size_multiple(self.pipe)
        size = {"height": checked_size("height", height, multiple), "width": checked_size("width", width, multiple)}
        other._arguments = self._arguments | size
        other._preparation = dataclasses.replace(self._preparation, latents=self._preparation.latents | size)
        other.height, other.width = size["height"], size["width"]
        other.image_shape = (*self.image_shape[:-2], other.height, other.width)
        other.latent_shape = tuple(other.sample_latents(1, torch.Generator()).shape[1:])
        return other

    def sample_latents(self, batch: int, generator: torch.Generator | Sequence[torch.Generator]) -> torch.Tensor:
        """Draws the noise that the stock pipeline would start from.

        Args:
            batch: number of samples B.
            generator: one for the batch, or one for each sample.

        Returns:
            (B, *latent_shape), standard normal, float32, on the pipeline's device: what a float32 pipeline
            itself draws from this generator, bit for bit.

        Raises:
            ValueError: for a batch below 1 or another number of generators than samples.
            TypeError: for a batch that is no integer or a generator that is none.
        """
        batch = checked_count("batch", batch)
        generator = checked_generators(generator, batch)
        return self._as_passed(draw_latents(self.pipe, self._preparation, batch, generator))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The pictures of finished latents, as the stock pipeline decodes them.

        Differentiable in `latents`. Values that the autoencoder puts outside of [0, 1] are clamped, as in the
        stock pipeline, so their gradient is 0; it is exact inside.

        Args:
            latents: (B, *latent_shape), floating.

        Returns:
            (B, *image_shape) in [0, 1]; dtype and device of `latents`.

        Raises:
            ValueError: for latents of the wrong shape or with a non-finite value.
            TypeError: for latents that are no floating tensor.
        """
        check_latents(latents, self.latent_shape)
        return self._decode(latents).to(latents.device, latents.dtype)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The latents of pictures: those that `decode` turns back into about these pictures.

        Differentiable in `images`. The mode of the autoencoder's posterior, where it has a posterior.

        Args:
            images: (B, *image_shape) in [0, 1], floating.

        Returns:
            (B, *latent_shape); dtype and device of `images`.

        Raises:
            ValueError: for images of the wrong shape, or with a value that is not in [0, 1].
            TypeError: for images that are no floating tensor.
        """
        check_images(images, self.image_shape)
        vae = self._autoencoder()
        with frozen([vae]):
            latents = encode_images(vae, self.family, images.to(self.pipe._execution_device))
        return latents.to(images.device, images.dtype)

    # ---- one call ------------------------------------------------------------------------------------------

    def _run(self, latents: torch.Tensor, index: list[int], differentiable: bool) -> torch.Tensor:
        pipe = self.pipe
        device = pipe._execution_device
        arguments, encodings = for_rows(self.family, self._arguments, self._preparation.encodings, index, device)
        arguments["generator"] = [self._generator(i) for i in index]
        arguments["latents"] = latents.to(device, self._preparation.latents["dtype"])
        denoisers = denoisers_of(self.pipe)
        scheduler = self._current_scheduler()
        recompute = differentiable and self.gradient_checkpointing
        with checkpointed(denoisers) if recompute else frozen(denoisers):
            last = run_loop(pipe, scheduler, arguments, encodings, after_steps=not self.family.returns_latents)
        return self._as_passed(last)

    def _as_passed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents from within the stock call in the shape that its `latents` argument has."""
        if self.family.returns_latents:
            return latents
        side = getattr(self.pipe, self.family.scale_factor) * self.family.patch
        return latents.transpose(1, 2).unflatten(2, (self.height // side, self.width // side))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae, factor = self._autoencoder(), getattr(self.pipe, self.family.scale_factor)
        latents = latents.to(self.pipe._execution_device)
        with frozen([vae]):
            return decode_latents(vae, self.family, latents, self.height // factor, self.width // factor)

    def _autoencoder(self) -> Any:
        """The pipeline's, or a float32 copy where the stock call casts it to float32 and back."""
        vae = self.pipe.vae
        if vae.config.get("timestep_conditioning", False):
            raise ValueError(f"`output` is 'image'; takes 'latent' where {type(vae).__name__} adds noise of its own")
        if not (self.family.upcast_autoencoder and vae.dtype == torch.float16 and vae.config.force_upcast):
            return vae
        if self._upcast is None:
            self._upcast = copy.deepcopy(vae).float()
        return self._upcast.to(self.pipe._execution_device)

    def _generator(self, prompt: int) -> torch.Generator:
        device, state = self._noise[prompt if len(self._noise) > 1 else 0]
        generator = torch.Generator(device)
        generator.set_state(state)
        return generator

    def _current_scheduler(self) -> Any:
        return self.pipe.scheduler if self.scheduler is None else self.scheduler
