"""The consensus of points by their energies: a mean with Gibbs weights, and how sharp those are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["alpha_for_ess", "better", "checked_alpha", "consensus_point", "finite_energies"]


def consensus_point(x: Tensor, energy: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """The mean of points with weights proportional to exp(-alpha energy).

    Weights are a softmax of -alpha (E_i - min E) in float64, so nothing overflows; a point whose energy is not finite
    has weight 0. An infinite alpha takes the first of the least energies.

    Source: Riedl, Klock, Geldhauser, Fornasier, "Gradient is All You Need?" (arXiv 2306.09778), equation 4.

    Args:
        x: (N, *shape) floating.
        energy: (N,) lower is better.
        alpha: > 0, may be infinite.

    Returns:
        The point, shaped as one of `x` in its dtype, and the weights (N,) float64 on the CPU.

    Raises:
        ValueError: alpha <= 0, another shape of `energy`, or no energy that is finite.

    Example:
        >>> point, weights = consensus_point(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, math.log(3.0)]), 1.0)
        >>> round(point.item(), 4), [round(w, 4) for w in weights.tolist()]
        (0.25, [0.75, 0.25])
    """
    alpha = float(alpha)
    if not alpha > 0:
        raise ValueError(f"`alpha` is {alpha}; takes a number > 0")
    energy = finite_energies(energy, len(x))
    height = energy - energy.min()
    if math.isinf(alpha):
        weights = torch.zeros_like(height)
        weights[height.argmin()] = 1.0
    else:
        weights = torch.softmax(-alpha * height, 0)
    wide = torch.promote_types(x.dtype, torch.float32)
    point = torch.tensordot(weights.to(x.device, wide), torch.where(_rows(energy, x), x, 0).to(wide), dims=1)
    return point.to(x.dtype), weights


def alpha_for_ess(energy: Tensor, eta: float = 0.2) -> float:
    """The alpha at which the effective sample size of the weights, 1 / sum w_i^2, is a share of their number.

    Solved by bisection of log alpha. Energies that tie at the minimum keep equal weights however large alpha is; then
    a very large alpha is returned, whose consensus is their mean.

    Args:
        energy: (N,); those not finite count among N with weight 0.
        eta: share in (0, 1].

    Raises:
        ValueError: `eta` out of range or no energy that is finite.

    Example:
        >>> energy = torch.arange(10.0)
        >>> weights = torch.softmax(-alpha_for_ess(energy, 0.3) * energy.double(), 0)
        >>> round((1 / weights.square().sum()).item(), 4)
        3.0
    """
    if not 0 < eta <= 1:
        raise ValueError(f"`eta` is {eta}; takes a number in (0, 1]")
    energy = finite_energies(energy, len(energy))
    height = energy - energy.min()
    spread = float(height[torch.isfinite(height)].max())
    if spread == 0:
        return 1.0

    def size(log_scale: float) -> float:
        weights = torch.softmax(-(math.exp(log_scale) / spread) * height, 0)
        return float(1 / weights.square().sum())

    low, high = math.log(1e-8), math.log(1e15)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > eta * len(energy) else (low, middle)
    return math.exp(high) / spread


def checked_alpha(alpha: Any) -> float | str:
    """A positive number, infinity, or "ess"; raises ValueError otherwise."""
    if alpha == "ess":
        return alpha
    if isinstance(alpha, (bool, str)) or not float(alpha) > 0:
        raise ValueError(f"`alpha` is {alpha!r}; takes a number > 0 or 'ess'")
    return float(alpha)


def better(best: tuple[Tensor, float] | None, x: Tensor, energies: Tensor) -> tuple[Tensor, float]:
    """The lower of the best so far and the best of these points; of equal ones the first."""
    index = int(energies.argmin())
    if best is not None and best[1] <= float(energies[index]):
        return best
    return x[index].clone(), float(energies[index])


def finite_energies(energy: Tensor, count: int) -> Tensor:
    """Energies (N,) float64 on the CPU, infinite where they are not finite.

    Raises:
        ValueError: for another shape, or none that is finite.
    """
    if not isinstance(energy, Tensor) or tuple(energy.shape) != (count,):
        got = f"shape {tuple(energy.shape)}" if isinstance(energy, Tensor) else f"a {type(energy).__name__}"
        raise ValueError(f"`energy` is {got}; takes ({count},), one number a point")
    energy = energy.detach().double().cpu()
    energy = torch.where(torch.isfinite(energy), energy, torch.inf)
    if not bool(torch.isfinite(energy).any()):
        raise ValueError("`energy` has no finite value: nothing to form a consensus of")
    return energy


def _rows(energy: Tensor, x: Tensor) -> Tensor:
    return torch.isfinite(energy).to(x.device).view(-1, *[1] * (x.ndim - 1))
