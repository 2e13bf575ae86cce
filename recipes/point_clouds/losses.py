"""The reconstruction losses of the paper's table (arXiv 2301.04791), by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trimtab.geometry import (
    AmortizedSlicedWasserstein,
    AmortizedSlicer,
    chamfer_distance,
    distributional_sliced_wasserstein,
    earth_movers_distance,
    max_sliced_wasserstein,
    sliced_wasserstein,
)

__all__ = ["LOSSES", "adaptive_sliced_wasserstein", "build_loss"]

Distance = Callable[[Tensor, Tensor, torch.Generator], Tensor]
_SLICERS = {
    "l": "linear",
    "g": "generalized_linear",
    "n": "non_linear",
    "a": "attention",
    "ea": "efficient_attention",
    "la": "linear_attention",
}


class _Plain(nn.Module):
    """A distance without weights of its own."""

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        self.distance = distance

    def loss(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """The mean over the batch, differentiable in ``y``."""
        return self.distance(x, y, generator).mean()


def adaptive_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    *,
    tolerance: float = 0.05,
    round_size: int = 10,
    max_projections: int = 500,
) -> Tensor:
    """``SW_2^2`` with as many slices as its own standard error asks for (ASW of PointSWD, Nguyen et al. 2021).

    Args:
        x: (B, N, d).
        y: (B, M, d).
        generator: of the directions.
        tolerance: slices are added until the standard error is below this fraction of the mean in all clouds.
        round_size: slices added at a time.
        max_projections: at most so many.

    Returns:
        (B,).
    """
    from trimtab.geometry import sample_directions

    total, squares, count, drawn = 0.0, 0.0, 0, []
    while count < max_projections:
        theta = sample_directions(round_size, x.shape[-1], generator=generator, device=x.device, dtype=x.dtype)
        with torch.no_grad():
            slices = sliced_wasserstein(x.detach(), y.detach(), projections=theta, reduction="slices")
        drawn.append(theta)
        total, squares, count = total + slices.sum(1), squares + slices.square().sum(1), count + round_size
        variance = (squares / count - (total / count).square()).clamp_min(0.0) / count
        if bool((variance.sqrt() <= tolerance * total / count).all()):
            break
    return sliced_wasserstein(x, y, projections=torch.cat(drawn))


def _amortized(kind: str, kappa: float) -> Callable[[int, float, int], nn.Module]:
    def build(num_points: int, paper_kappa: float, num_projections: int) -> nn.Module:
        fixed = None if kind in ("attention", "efficient_attention") else num_points
        slicer = AmortizedSlicer(kind, num_points=fixed)
        chosen = kappa if math.isinf(kappa) else paper_kappa
        return AmortizedSlicedWasserstein(slicer, kappa=chosen, num_projections=num_projections)

    return build


LOSSES: dict[str, Callable[[int, float, int], nn.Module]] = {
    "cd": lambda n, k, count: _Plain(lambda x, y, g: chamfer_distance(x, y)),
    "emd": lambda n, k, count: _Plain(lambda x, y, g: earth_movers_distance(x, y)),
    "sw": lambda n, k, count: _Plain(lambda x, y, g: sliced_wasserstein(x, y, num_projections=count, generator=g)),
    "max-sw": lambda n, k, count: _Plain(lambda x, y, g: max_sliced_wasserstein(x, y, num_projections=1, generator=g)),
    "asw": lambda n, k, count: _Plain(adaptive_sliced_wasserstein),
    "v-dsw": lambda n, k, count: _Plain(
        lambda x, y, g: distributional_sliced_wasserstein(x, y, kappa=k, num_projections=count, generator=g)
    ),
    **{f"{key}-v-dsw": _amortized(kind, 1.0) for key, kind in _SLICERS.items()},
    **{f"{key}-max-sw": _amortized(kind, math.inf) for key, kind in _SLICERS.items() if key in ("l", "g", "n")},
}
"""Losses by the table's names in lower case; each is built from the number of points, kappa and the slices."""


def build_loss(name: str, num_points: int, *, kappa: float = 1.0, num_projections: int = 100) -> nn.Module:
    """A loss with ``loss(x, y, generator)`` and, where it has an adversary, ``joint_loss(x, y, generator)``.

    Args:
        name: one of :data:`LOSSES`.
        num_points: of the clouds.
        kappa: of the v-DSW losses.
        num_projections: of the sliced ones.

    Raises:
        ValueError: an unknown name.
    """
    if name not in LOSSES:
        raise ValueError(f"`name` must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name](num_points, kappa, num_projections)
