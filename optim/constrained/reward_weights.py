"""Weights of several rewards under which what they train is best for a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_number, checked_point
from trimtab.optim.search.domains import Simplex

from .bilevel import BilevelProblem, BilevelResult, lv_hba

__all__ = ["TunedWeights", "tune_reward_weights"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TunedWeights:
    """What `tune_reward_weights` found.

    Attributes:
        weights: (q,) on the simplex.
        y: what the rewards train, under these weights.
        result: of the loop, whose x are the weights.
    """

    weights: Tensor
    y: Tensor
    result: BilevelResult


def tune_reward_weights(
    rewards: Sequence[Function],
    judge: Function,
    y0: Tensor,
    *,
    radius: float | None = None,
    center: Tensor | None = None,
    regularization: float = 0.005,
    weights0: Tensor | None = None,
    steps: int = 3000,
    **options: Any,
) -> TunedWeights:
    """max_w judge(y) over y that maximizes sum_i w_i r_i(y) - regularization ||y||^2, w on the simplex.

    The weights are projected on the simplex, so that one which is of no use becomes 0 in finitely many steps; logits of
    a softmax would creep towards it.
    y is what is trained or optimized: a head on frozen features, adapter weights, a code of noise. The lower level must
    be about concave in it. See `lv_hba`.

    Args:
        rewards: q >= 2 functions of y, scalars with gradients, higher is better.
        judge: a held-out one.
        y0: where to start, of any shape.
        radius: ||y - center|| is at most this; None leaves it free.
        center: of that ball; None is 0.
        regularization: >= 0.
        weights0: (q,) on the simplex, None is equal ones.
        steps: iterations.
        options: of `lv_hba`, `callback` and `state` among them; by default alpha 0.05, beta and eta 0.1, both gammas 1,
            c0 0.1.

    Raises:
        ValueError: a number out of range, fewer than two rewards, or `weights0` that are not on the simplex.

    Example:
        >>> targets = [torch.tensor([1.0]), torch.tensor([-1.0])]
        >>> rewards = [lambda y, t=t: -(y - t).square().sum() for t in targets]
        >>> found = tune_reward_weights(rewards, rewards[0], torch.zeros(1), steps=500)
        >>> bool(found.weights[0] > 0.6)
        True
    """
    if len(rewards) < 2:
        raise ValueError(f"`rewards` has {len(rewards)}; takes two or more")
    start = checked_point("y0", y0)
    weight = checked_number("regularization", regularization, least=0)
    simplex = Simplex(len(rewards))
    equal = start.new_full((len(rewards),), 1 / len(rewards))
    weights = equal if weights0 is None else checked_point("weights0", weights0).to(start)
    if weights.shape != equal.shape:
        raise ValueError(f"`weights0` has shape {tuple(weights.shape)}; takes ({len(rewards)},), one a reward")
    if bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-4:
        raise ValueError(f"`weights0` is {weights.tolist()}; takes numbers >= 0 that sum to 1")

    project = _projection(start, radius, center)

    def lower(x: Tensor, y: Tensor) -> Tensor:
        values = torch.stack([reward(y) for reward in rewards])
        return weight * y.square().sum() - x @ values

    problem = BilevelProblem(
        lambda x, y: -judge(y),
        lower,
        project_xy=lambda x, y: (simplex.project(x).to(x), project(y)),
        project_y=project,
    )
    settings = {"alpha": 0.05, "beta": 0.1, "eta": 0.1, "gamma1": 1.0, "gamma2": 1.0, "c0": 0.1, **options}
    result = lv_hba(problem, weights, start, steps=steps, **settings)
    return TunedWeights(result.x, result.y, result)


def _projection(like: Tensor, radius: float | None, center: Tensor | None) -> Function:
    """On the ball of this radius; None leaves all as it is."""
    if radius is None:
        return lambda y: y
    limit = checked_number("radius", radius, above=0)
    middle = torch.zeros_like(like) if center is None else checked_point("center", center).to(like)

    def project(y: Tensor) -> Tensor:
        away = y - middle
        return middle + away * (limit / torch.linalg.vector_norm(away).clamp_min(limit))

    return project
