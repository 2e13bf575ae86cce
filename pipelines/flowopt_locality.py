"""Edits that stay where they are: what hardly differs from the source is the source."""

from __future__ import annotations

import math
import numbers

import torch
from torch.nn.functional import avg_pool2d, pad

from .flowopt_mask import MaskedPath

__all__ = ["Locality", "checked_locality"]


class Locality:
    """Finds from each iterate where the edit is, keeps the next one to the source elsewhere, and weights its residual.

    With r = f(x) - y and m the mean of r^2 at a place over its channels (and over the 3 x 3 places around it),

        w = (1 + m / s^2)^-2,    s = scale * deviation of y

    is the weight of the Geman-McClure loss m / (1 + m / s^2) (Geman and McClure, "Statistical Methods for Tomographic
    Image Reconstruction", 1987) in iteratively reweighted least squares: where r is much larger than s it is the edit
    itself, which the iteration is not to undo; where it is smaller it is what the edit should not have touched. So the
    update is x <- x - step_size w r, and the next pass samples under the soft mask 1 - w: elsewhere its latents are
    mixed with the source's own path, as under a mask that a person drew. Not in the FlowOpt paper (arXiv 2510.22010),
    whose residual is plain.

    Args:
        scale: > 0, s relative to the deviation of each picture's latents.
        target: (B, *latent_shape) float32, y.
        path: what the sampler is held to; a mask that it has already is multiplied.
    """

    def __init__(self, scale: float, target: torch.Tensor, path: MaskedPath) -> None:
        self.target, self.path = target, path
        self.given = path.mask
        deviation = target.flatten(1).std(1).reshape(-1, *[1] * (target.ndim - 1))
        self.square = (scale * deviation).square().clamp_min(1e-12)
        self.weight = torch.ones_like(target[..., :1])

    def watch(self, value: torch.Tensor) -> torch.Tensor:
        """Takes f(x) (B, *latent_shape), from which the weights and the next pass's mask follow; gives it back."""
        spatial = value.ndim == 4
        energy = (value.float() - self.target).square().mean(1 if spatial else -1, keepdim=True)
        if spatial:
            energy = avg_pool2d(pad(energy, (1, 1, 1, 1), mode="replicate"), 3, 1)
        self.weight = (1 + energy / self.square).pow(-2)
        mask = (1 - self.weight).expand_as(self.target)
        self.path.mask = mask if self.given is None else mask * self.given.to(mask.device)
        self.path.target = self.target
        return value

    def weighted(self, step: torch.Tensor) -> torch.Tensor:
        """The update (B, *latent_shape) under the weights."""
        return step * self.weight


def checked_locality(value: float | None) -> float | None:
    """The argument `locality`.

    Raises:
        TypeError: it is neither None nor a number.
        ValueError: it is not > 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`locality` is a {type(value).__name__}; takes None or a number > 0")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`locality` is {value}; takes None or a finite number > 0")
    return float(value)
