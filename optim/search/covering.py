"""Covering direct search as a loop over a function's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_scalar, checked_vector

from .direct_search import DirectSearch
from .polling import DirectSearchResult

__all__ = ["covering_direct_search"]


def covering_direct_search(
    objective: Callable[[Tensor], Tensor | float],
    x0: Tensor,
    *,
    constraints: Callable[[Tensor], Tensor] | None = None,
    max_evals: int = 2000,
    r0: float = 1.0,
    r_min: float = 1e-5,
    r_max: float = 10.0,
    callback: Callable[[DirectSearch], bool | None] | None = None,
    **options: Any,
) -> DirectSearchResult:
    """Maximizes a function of up to a few hundred unknowns by its values; see `DirectSearch`.

    Args:
        objective: x to a number, larger is better. It must give the same value for the same point.
        x0: where to start.
        constraints: x to (p,), feasible where all are <= 0.
        max_evals: evaluations of the objective.
        r0: radius at the start and of the covering step.
        r_min: least polling radius; the covering step goes on there.
        r_max: largest polling radius.
        callback: called with the search after each evaluation; a true value ends the run.
        options: of `DirectSearch`: `barrier`, `penalty`, `retract`, `poll`, `covering`, `generator`.

    Raises:
        ValueError: a number out of range, an objective that gives no number, constraints of another shape, or a start
            that is infeasible under the extreme barrier.

    Example:
        >>> found = covering_direct_search(lambda x: -(x - 3).abs().sum(), torch.zeros(2), max_evals=300)
        >>> found.value > -1e-3, found.feasible
        (True, True)
    """
    search = DirectSearch(x0, r0=r0, r_dsm=(r_min, r_max), **options)
    reason = "evaluations"
    with torch.no_grad():
        for _ in range(checked_count("max_evals", max_evals)):
            x = search.ask()
            value = checked_scalar("objective", objective(x))
            search.tell(value, None if constraints is None else checked_vector("constraints", constraints(x)))
            if callback is not None and callback(search):
                reason = "callback"
                break
    return search.result(0, reason)
