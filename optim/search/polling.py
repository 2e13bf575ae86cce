"""Directions and radii of direct search, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.optim.checks import checked_number

__all__ = ["DirectSearchResult", "checked_radii", "poll_direction"]


@dataclass(frozen=True)
class DirectSearchResult:
    """What a direct search found.

    Attributes:
        x: the best feasible point, or the incumbent where none was feasible.
        value: the objective there, to be large.
        feasible: whether all constraints are <= 0 there.
        num_evaluations: of the objective.
        num_gradients: of attacks.
        trace: (evaluations, value, step) at each move of the incumbent; step is "start", "attack", "covering",
            "search" or "poll".
        stop_reason: why it ended.
    """

    x: Tensor
    value: float
    feasible: bool
    num_evaluations: int
    num_gradients: int
    trace: tuple[tuple[int, float, str], ...]
    stop_reason: str


def poll_direction(v: Tensor, index: int) -> Tensor:
    """Row `index` of [H; -H; -sum of H's rows], H = I - 2 v v^T, at largest entry 1, without forming H.

    Args:
        v: of any shape, of Euclidean norm 1; n is its number of elements.
        index: 0 to 2 n.

    Example:
        >>> import torch
        >>> poll_direction(torch.tensor([0.6, 0.8]), 0)
        tensor([ 0.2917, -1.0000])
    """
    n, flat = v.numel(), v.flatten()
    if index == 2 * n:
        row = -(1 - 2 * flat * flat.sum())
    else:
        row = -2 * flat[index % n] * flat
        row[index % n] += 1
        row = -row if index >= n else row
    return (row / row.abs().max()).view_as(v)


def checked_radii(name: str, radii: tuple[float, float], r0: float) -> tuple[float, float]:
    """A least and a largest radius about `r0`; raises ValueError unless 0 < least <= r0 and least <= largest."""
    low, high = (checked_number(name, radius, above=0) for radius in radii)
    if not low <= min(checked_number("r0", r0, above=0), high):
        raise ValueError(f"`{name}` is {tuple(radii)} with r0 = {r0}; takes 0 < least <= r0 and least <= largest")
    return low, high
