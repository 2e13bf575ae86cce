"""What editing and inverting give: a state for each iteration, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

__all__ = ["FlowOptPipelineOutput", "FlowOptState", "as_output_type"]


@dataclass(frozen=True)
class FlowOptState:
    """An iteration's result.

    Attributes:
        iteration: k; 0 is the inverse scheduler's start.
        latents: (B, *latent_shape) float32, the clean latents f(x_k).
        noise: (B, *latent_shape) float32, the iterate x_k, at the level of the start.
        residuals: (B,) float32 on the CPU, root mean square of f(x_k) - y.
        num_function_evaluations: evaluations of the denoiser a picture so far, a guided step counting two.
        scores: (B,) what `selection` gave, where it is a function.
        similarities: (B,) PSNR in dB between the picture and its source, where `selection` is a function.
    """

    iteration: int
    latents: torch.Tensor
    noise: torch.Tensor
    residuals: torch.Tensor
    num_function_evaluations: int
    scores: torch.Tensor | None = None
    similarities: torch.Tensor | None = None
    _decode: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def images(self) -> torch.Tensor:
        """(B, 3, H, W) float32 in [0, 1] on the CPU, decoded when asked for."""
        return self._decode(self.latents)

    def stored(self, *, latents: bool) -> FlowOptState:
        """The state with its latents on the CPU, or without them."""
        kept = (value.cpu() if latents else None for value in (self.latents, self.noise))
        return dataclasses.replace(self, **dict(zip(("latents", "noise"), kept, strict=True)))


@dataclass
class FlowOptPipelineOutput(BaseOutput):
    """The result of an edit or an inversion.

    Attributes:
        images: the chosen iterate's pictures, as `output_type` says.
        latents: (B, *latent_shape) float32: of an edit the clean latents of `images`, of an inversion the noise that
            the pipeline makes `images` of.
        residuals: (iterations, B) float32, root mean square of f(x_k) - y.
        num_function_evaluations: evaluations of the denoiser a picture, a guided step counting two, those that
            estimated the step size among them.
        step_size: (B,) float32, the step that was used.
        selected: (B,) the number of the chosen iterate.
        history: the states of all iterations with latents on the CPU, where they were asked for; decoding waits until
            `history[k].images` is read.
        scores: (iterations, B) what `selection` gave, where it is a function.
        similarities: (iterations, B) PSNR in dB of each iterate's pictures and their sources, as for `scores`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    latents: torch.Tensor
    residuals: torch.Tensor
    num_function_evaluations: int
    step_size: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    history: list[FlowOptState] | None = None
    scores: torch.Tensor | None = None
    similarities: torch.Tensor | None = None


def as_output_type(images: torch.Tensor, output_type: str) -> Any:
    """(B, 3, H, W) in [0, 1] as "pil", "np" or "pt" pictures."""
    if output_type == "pt":
        return images
    arrays = images.movedim(1, -1).numpy()
    if output_type == "np":
        return arrays
    return [PIL.Image.fromarray((array * 255).round().astype(np.uint8)) for array in arrays]
