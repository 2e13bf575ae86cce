"""Optimistic gradient players of many step sizes under one mixture, for targets that move."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number

from .domains import Domain
from .mirror_descent import OptimisticMirrorDescent

__all__ = ["DynamicMirrorDescent"]


class DynamicMirrorDescent:
    """An ensemble that keeps up with comparators u_1 ... u_T of any path length P = sum ||u_t - u_{t-1}||.

    N = O(log T) optimistic gradient players with doubling step sizes eta_i = 2^(i-1) D / (G sqrt(8 T)), at most
    1 / (8 L), all told the gradient g_t at the mixture x_t = sum_i p_i x_{t,i}. The mixture is optimistic Hedge over

        l_{t,i} = <g_t, x_{t,i}> + 2 L ||x_{t,i} - x_{t-1,i}||^2

    with g_{t-1} in place of g_t as its guess: the second term charges players for moving, so that the mixture stays
    calm. Regret against any such path is of order P + sqrt(1 + P) (sqrt(sum sigma_t^2) + sqrt(sum Sigma_t^2)).

    Source: Chen et al., arXiv 2302.04552, section on dynamic regret, after Zhao, Zhang, Zhang, Zhou, "Adaptivity and
    Non-stationarity" (arXiv 2112.14368), Sword++. The mixture's step adapts as that of `OptimisticMirrorDescent`.

    Args:
        domain: where x lies.
        lipschitz: G > 0.
        smoothness: L >= 0; 0 puts no limit on step sizes but D / G.
        horizon: rounds T that step sizes are spread for, >= 1.
        dtype: of what is played.

    Raises:
        ValueError: a number out of range.
        TypeError: if `domain` is none.

    Example:
        >>> from trimtab.optim.search import Box
        >>> player = DynamicMirrorDescent(Box(-torch.ones(1), torch.ones(1)), lipschitz=2.0, horizon=100)
        >>> for t in range(100):
        ...     x = player.predict()
        ...     player.update(x - (1.0 if t < 50 else -1.0))
        >>> x.item() < -0.9
        True
    """

    def __init__(
        self,
        domain: Domain,
        *,
        lipschitz: float,
        smoothness: float = 0.0,
        horizon: int = 1000,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        rounds = checked_count("horizon", horizon)
        self.lipschitz = checked_number("lipschitz", lipschitz, above=0)
        self.smoothness = checked_number("smoothness", smoothness, least=0)
        first = None if not isinstance(domain, Domain) else domain.diameter / (lipschitz * math.sqrt(8 * rounds))
        limit = 1 / (8 * smoothness) if smoothness else math.inf
        sizes = [1.0] if first is None else [min(first, limit)]
        while first is not None and sizes[-1] < min(limit, domain.diameter / lipschitz):
            sizes.append(min(2 * sizes[-1], limit))
        self.players = [
            OptimisticMirrorDescent(
                domain, lipschitz=lipschitz, mirror="euclidean", step_size=size, adaptive_lipschitz=True, dtype=dtype
            )
            for size in sizes
        ]
        self.losses = torch.zeros(len(sizes), dtype=dtype)
        self.last = self.players[0].last
        self.spread = (lipschitz * domain.diameter) ** 2
        self.before: Tensor | None = None
        self._played: tuple[Tensor, Tensor, Tensor] | None = None

    def predict(self) -> Tensor:
        """x_t."""
        points = torch.stack([player.predict() for player in self.players])
        moved = torch.zeros_like(self.losses)
        if self.before is not None:
            moved = 2 * self.smoothness * (points - self.before).flatten(1).square().sum(1)
        guess = points.flatten(1) @ self.last.flatten() + moved
        step = math.sqrt(math.log(max(len(points), 2)) / self.spread)
        weights = torch.softmax(-step * (self.losses + guess), 0)
        self._played = (points, moved, guess)
        return torch.tensordot(weights, points, dims=1)

    def update(self, gradient: Tensor) -> None:
        """Takes the gradient of this round's loss at the last `predict`; raises as `OptimisticMirrorDescent` does."""
        if self._played is None:
            raise RuntimeError("`update` takes the gradient at what `predict` gave; call `predict` first")
        for player in self.players:
            player.update(gradient)
        points, moved, guess = self._played
        self.last = self.players[0].last
        losses = points.flatten(1) @ self.last.flatten() + moved
        self.spread += float((losses - guess).abs().max()) ** 2
        self.losses = self.losses + losses
        self.before, self._played = points, None

    def state_dict(self) -> dict[str, Any]:
        """What an ensemble of the same settings goes on from, between rounds."""
        return {
            "players": [player.state_dict() for player in self.players],
            "losses": self.losses.clone(),
            "spread": self.spread,
            "before": None if self.before is None else self.before.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: for the state of another ensemble.
        """
        if set(state) != {"players", "losses", "spread", "before"} or len(state["players"]) != len(self.players):
            raise ValueError("`state` is none of such an ensemble; takes its `state_dict()`")
        for player, saved in zip(self.players, state["players"], strict=True):
            player.load_state_dict(saved)
        self.losses, self.spread, self.before = state["losses"].clone(), state["spread"], state["before"]
        self.last, self._played = self.players[0].last, None
