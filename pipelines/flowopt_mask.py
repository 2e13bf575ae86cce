"""An edit that stays inside a mask: in the latents while the sampler runs, and in the pixels at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import adaptive_max_pool2d, max_pool2d, pad

from .blending import poisson_blend
from .families import Family
from .latents import to_tokens

__all__ = ["BLENDS", "MaskedPath", "check_blend", "feather", "latent_mask", "set_in"]


def latent_mask(mask: torch.Tensor, family: Family, latent_shape: tuple[int, ...], factor: int) -> torch.Tensor:
    """A mask of pixels as one of latents: a latent may change where any of its pixels may.

    Args:
        mask: (B, 1, H, W) in [0, 1].
        family: the pipeline's entry in the table.
        latent_shape: of one sample, as the stock call takes it.
        factor: pixels to a side of a latent pixel.

    Returns:
        (B, *latent_shape), or what broadcasts to it.
    """
    if not family.tokens:
        return adaptive_max_pool2d(mask, latent_shape[-2:])
    height, width = (side // factor for side in mask.shape[-2:])
    channels = latent_shape[-1] // family.patch**2
    return to_tokens(adaptive_max_pool2d(mask, (height, width)).expand(-1, channels, -1, -1), family.patch)


class MaskedPath:
    """A step's end in which the latents outside of the mask are the source's own.

    The source's latents y and those that its inversion ended at lie on a path of the noise schedule, signal y + noise
    e with one e. After each step of the sampler, what is outside of the mask is set to that path at the new level, so
    the network always sees the true surroundings of what it changes, and they end as y.

    Args:
        then: the user's own callback at a step's end, called first.

    Attributes:
        mask: what `latent_mask` gave, or any weights in [0, 1]. Until it is set, nothing happens.
        target: (B, *latent_shape) float32, y.
        reference: (B, *latent_shape) float32, where the inversion of y ended. Until it is set, nothing happens.
    """

    def __init__(self, then: Callable[..., dict[str, Any]] | None = None) -> None:
        self.mask: torch.Tensor | None = None
        self.target: torch.Tensor | None = None
        self.reference: torch.Tensor | None = None
        self._then = then

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """A stock pipeline's `callback_on_step_end`."""
        if self._then is not None:
            tensors = {**tensors, **self._then(pipe, step, timestep, tensors)}
        if self.reference is None or self.mask is None:
            return tensors
        latents = tensors["latents"]
        y, x = self.target.to(latents.device), self.reference.to(latents.device)
        path, mask = _between(pipe.scheduler, step + 1, x, y), self.mask.to(latents.device).expand_as(y)
        if path.ndim == 4 and latents.ndim == 3:  # within such a call latents are tokens, outside of it they are not
            path, mask = (value.flatten(2).transpose(1, 2) for value in (path, mask))
        mixed = torch.lerp(path, latents.float(), mask).to(latents.dtype)
        return {**tensors, "latents": mixed}


def _between(scheduler: Any, place: int, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The latents at a place of a schedule with one signal and one noise throughout, `start` first and `end` last."""
    (signal_0, noise_0), (signal, noise), (signal_1, noise_1) = (_level(scheduler, i) for i in (0, place, None))
    e = (signal_1 * start - signal_0 * end) / (signal_1 * noise_0 - signal_0 * noise_1)
    return signal * (end - noise_1 * e) / signal_1 + noise * e


def _level(scheduler: Any, place: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of signal and noise in the latents before step `place` of a schedule; None is after the last step."""
    if hasattr(scheduler, "alphas_cumprod"):
        last = place in (None, len(scheduler.timesteps))
        signal = scheduler.final_alpha_cumprod if last else scheduler.alphas_cumprod[scheduler.timesteps[place].cpu()]
        return signal.sqrt(), (1 - signal).sqrt()
    sigma = scheduler.sigmas[-1 if place is None else place]
    return 1 - sigma, sigma


def feather(images: torch.Tensor, pictures: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Edited pictures set into their sources, faded in from the mask's edge inwards; outside nothing changes.

    Args:
        images: (B, 3, H, W), the edit.
        pictures: (B, 3, H, W), the source.
        mask: (B, 1, H, W) in [0, 1].

    Returns:
        (B, 3, H, W)
    """
    width = max(1, min(mask.shape[-2:]) // 64)
    weight, eroded = mask.clone(), mask
    for _ in range(width):
        eroded = -max_pool2d(pad(-eroded, (1, 1, 1, 1), mode="replicate"), 3, 1)
        weight += eroded
    return torch.lerp(pictures, images, weight / (width + 1))


BLENDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "feather": feather,
    "poisson": poisson_blend,
    "poisson-mixed": partial(poisson_blend, mixed=True),
}
"""Ways to set an edit into its picture: functions of (edit, picture, mask)."""


def check_blend(blend: str | None) -> None:
    """Refuses what is no name of a blend.

    Raises:
        ValueError: `blend` is not None, "none" or one of `BLENDS`.
    """
    if blend not in (None, "none", *BLENDS):
        raise ValueError(f"`blend` is {blend!r}; takes None, 'none' or one of {', '.join(map(repr, BLENDS))}")


def set_in(images: torch.Tensor, pictures: torch.Tensor, mask: torch.Tensor | None, blend: str | None) -> torch.Tensor:
    """Edited pictures set into their sources under a mask.

    Args:
        images: (B, 3, H, W) in [0, 1], the edit.
        pictures: (B, 3, H, W), the source.
        mask: (B, 1, H, W) in [0, 1]; None is everywhere: `images` as they are.
        blend: of `BLENDS`; None is "feather", "none" leaves `images` as they are.

    Returns:
        (B, 3, H, W)
    """
    return images if mask is None or blend == "none" else BLENDS[blend or "feather"](images, pictures, mask)
