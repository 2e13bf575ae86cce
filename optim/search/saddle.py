"""Saddle points by two optimistic players, and the regret of a player."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count

from .domains import Domain
from .mirror_descent import OptimisticMirrorDescent

__all__ = ["RegretTracker", "SaddleResult", "solve_saddle"]


class RegretTracker:
    """The regret of a player from the gradients at its points.

    Args:
        domain: where comparators lie.

    Example:
        >>> from trimtab.optim.search import Simplex
        >>> tracker = RegretTracker(Simplex(2))
        >>> tracker.record(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
        >>> tracker.regret()
        0.5
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.rounds = 0
        self.paid: Tensor | float = 0.0
        self.total: Tensor | None = None

    def record(self, gradient: Tensor, x: Tensor) -> None:
        """Adds a round: the gradient of its loss at x."""
        self.rounds += 1
        self.paid = self.paid + (gradient * x).sum()
        self.total = gradient.clone() if self.total is None else self.total + gradient

    def regret(self, comparator: Tensor | None = None) -> float:
        """sum_t <g_t, x_t - u>, which bounds sum_t f_t(x_t) - f_t(u) for convex losses.

        Args:
            comparator: u; None is the one of the domain with the largest.
        """
        if self.total is None:
            return 0.0
        best = self.domain.lowest(self.total) if comparator is None else (self.total * comparator).sum()
        return float(self.paid - best)


@dataclass(frozen=True)
class SaddleResult:
    """What two players ended at.

    Attributes:
        x_average: of the minimizing player's points.
        y_average: of the maximizing player's.
        x_last: its last point.
        y_last: likewise.
        gap_history: after each round, a bound of the duality gap of the averages: the regrets' sum over the rounds;
            for a bilinear game it is the gap.
        rounds: played.
    """

    x_average: Tensor
    y_average: Tensor
    x_last: Tensor
    y_last: Tensor
    gap_history: tuple[float, ...]
    rounds: int


def solve_saddle(
    grad_x: Callable[[Tensor, Tensor], Tensor],
    grad_y: Callable[[Tensor, Tensor], Tensor],
    x_domain: Domain,
    y_domain: Domain,
    *,
    steps: int,
    optimistic: bool = True,
    lipschitz: float = 1.0,
    step_size: float | None = None,
    callback: Callable[[int, Tensor, Tensor], bool | None] | None = None,
) -> SaddleResult:
    """min_x max_y of a convex-concave function, both players by mirror descent.

    Two optimistic players reach a duality gap of order 1 / T, plain ones 1 / sqrt(T).

    Args:
        grad_x: the gradient with respect to x at (x, y).
        grad_y: with respect to y.
        x_domain: of x.
        y_domain: of y.
        steps: rounds, >= 1.
        optimistic: False guesses 0, which is plain mirror descent.
        lipschitz: where the players' bound of gradients begins; it grows with them.
        step_size: of all rounds, in place of the adaptive one.
        callback: called as (round, x, y) with what was played; a true value ends the run.

    Raises:
        ValueError: a number out of range, or a gradient of another shape or not finite.

    Example:
        >>> from trimtab.optim.search import Simplex
        >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> found = solve_saddle(lambda x, y: A @ y, lambda x, y: A.T @ x, Simplex(2), Simplex(2), steps=200)
        >>> found.gap_history[-1] < 0.01
        True
    """
    players = [
        OptimisticMirrorDescent(domain, lipschitz=lipschitz, adaptive_lipschitz=True, step_size=step_size)
        for domain in (x_domain, y_domain)
    ]
    trackers = [RegretTracker(domain) for domain in (x_domain, y_domain)]
    sums = [torch.zeros_like(player.centre) for player in players]
    gaps: list[float] = []
    for step in range(checked_count("steps", steps)):
        points = [player.predict(None if optimistic else torch.zeros_like(player.last)) for player in players]
        gradients = (grad_x(*points), -grad_y(*points))
        for i, (player, gradient) in enumerate(zip(players, gradients, strict=True)):
            player.update(gradient)
            trackers[i].record(gradient, points[i])
            sums[i] = sums[i] + points[i]
        gaps.append(sum(tracker.regret() for tracker in trackers) / (step + 1))
        if callback is not None and callback(step, *points):
            break
    rounds = len(gaps)
    return SaddleResult(sums[0] / rounds, sums[1] / rounds, points[0], points[1], tuple(gaps), rounds)
