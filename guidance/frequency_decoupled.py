"""Frequency-decoupled guidance, FDG (Sadat, Vontobel, Salehi, Weber, arXiv 2506.19713)."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  loading looks for it here
from torch.nn import functional

from .adaptive_projected import project
from .base import Guidance, check_finite

__all__ = ["FrequencyDecoupledGuidance", "from_laplacian_pyramid", "laplacian_pyramid"]


def laplacian_pyramid(pictures: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """The Laplacian pyramid of Burt and Adelson: differences between a picture and its smoothed half, at each size.

    Args:
        pictures: (B, C, H, W), floating.
        levels: how many, >= 1; the last is what remains of the picture, the others its details, finest first.

    Returns:
        ``levels`` tensors; each is half the size of the one before, rounded up.
    """
    pyramid = []
    for _ in range(levels - 1):
        smaller = _halve(pictures)
        pyramid.append(pictures - _enlarge(smaller, pictures.shape[-2:]))
        pictures = smaller
    return [*pyramid, pictures]


def from_laplacian_pyramid(pyramid: list[torch.Tensor]) -> torch.Tensor:
    """The picture of a Laplacian pyramid: the inverse of ``laplacian_pyramid``, exact whatever the filter."""
    pictures = pyramid[-1]
    for details in reversed(pyramid[:-1]):
        pictures = _enlarge(pictures, details.shape[-2:]) + details
    return pictures


def _smooth(pictures: torch.Tensor) -> torch.Tensor:
    """The binomial filter (1, 4, 6, 4, 1) / 16 in both directions, edges mirrored (repeated on tiny pictures)."""
    kernel = pictures.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = pictures.shape[1]
    for shape in ((1, 1, 5, 1), (1, 1, 1, 5)):
        axis = shape.index(5)
        pad = (0, 0, 2, 2) if axis == 2 else (2, 2, 0, 0)
        mode = "reflect" if pictures.shape[axis] > 2 else "replicate"
        weights = kernel.view(shape).expand(channels, -1, -1, -1)
        pictures = functional.conv2d(functional.pad(pictures, pad, mode=mode), weights, groups=channels)
    return pictures


def _halve(pictures: torch.Tensor) -> torch.Tensor:
    size = [(side + 1) // 2 for side in pictures.shape[-2:]]
    return functional.interpolate(_smooth(pictures), size=size, mode="bilinear", align_corners=False)


def _enlarge(pictures: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return _smooth(functional.interpolate(pictures, size=tuple(size), mode="bilinear", align_corners=False))


class FrequencyDecoupledGuidance(Guidance):
    """FDG: one guidance scale for each band of spatial frequencies.

        g = sum over the levels l of Laplacian pyramids:  u_l + w_l (d_perp + p_l d_par),  d = c_l - u_l

    Low scales at low frequencies keep colours and diversity, high scales at high ones sharpen details. ``attach`` puts
    the tokens of FLUX, Qwen-Image and LTX in their places first; their modular pipelines can't have it.

    Args:
        guidance_scale: the scale of the highest frequencies; the lowest get half of it, levels between them evenly
            spaced. Ignored if ``guidance_scales`` is given.
        guidance_scales: w_l, highest frequency first.
        parallel_weights: p_l, the weight of the part of d_l along c_l; one number for all levels, or one for each;
            None for 1.
        levels: how many bands, where ``guidance_scales`` isn't given.
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if a number is out of range or lengths differ.
    """

    needs_pictures = True

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 10.0,
        guidance_scales: Sequence[float] | None = None,
        parallel_weights: float | Sequence[float] | None = None,
        levels: int = 2,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        if callable(guidance_scale):
            raise ValueError("`guidance_scale` of FrequencyDecoupledGuidance must be a number, got a function")
        super().__init__(guidance_scale, start, stop, enabled)
        if guidance_scales is None:
            if not isinstance(levels, int) or levels < 1:
                raise ValueError(f"`levels` must be an integer >= 1, got {levels!r}")
            shares = [1 - 0.5 * i / (levels - 1) for i in range(levels)] if levels > 1 else [1.0]
            guidance_scales = [guidance_scale * share for share in shares]
        for scale in guidance_scales:
            check_finite("guidance_scales", scale, low=0.0)
        self.guidance_scales = list(guidance_scales)
        if parallel_weights is None or not isinstance(parallel_weights, Sequence):
            parallel_weights = [1.0 if parallel_weights is None else parallel_weights] * len(guidance_scales)
        if len(parallel_weights) != len(guidance_scales):
            raise ValueError(
                f"`parallel_weights` must have one number for each of {len(guidance_scales)} levels, got "
                f"{len(parallel_weights)}"
            )
        for weight in parallel_weights:
            check_finite("parallel_weights", weight)
        self.parallel_weights = list(parallel_weights)

    @property
    def guides(self) -> bool:
        return self._enabled and any(scale != 1 for scale in self.guidance_scales)

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        if pred_cond.ndim not in (4, 5):
            raise ValueError(
                f"frequencies need latents (B, C, H, W) or (B, C, frames, H, W), got {tuple(pred_cond.shape)}; "
                "attach() to a classic pipeline puts tokens in their places"
            )
        levels = len(self.guidance_scales)
        c, u = (laplacian_pyramid(self._as_pictures(p), levels) for p in (pred_cond, pred_uncond))
        guided = []
        for c_l, u_l, w, weight in zip(c, u, self.guidance_scales, self.parallel_weights, strict=True):
            d = c_l - u_l
            if weight != 1:
                batch = pred_cond.shape[0]
                parallel, _ = project(d.reshape(batch, -1), c_l.reshape(batch, -1))
                d = d + (weight - 1) * parallel.view_as(d)
            guided.append(u_l + w * d)
        result = from_laplacian_pyramid(guided)
        if pred_cond.ndim == 5:
            batch, channels, frames = pred_cond.shape[:3]
            result = result.view(batch, frames, channels, *result.shape[-2:]).transpose(1, 2)
        return result.to(pred_cond.dtype)

    @staticmethod
    def _as_pictures(prediction: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in at least float32; the frames of a video are pictures of their own."""
        wide = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return wide if wide.ndim == 4 else wide.transpose(1, 2).flatten(0, 1)
