"""Weights of several rewards as an adversary's: of each sample, the rewards that gain least count most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.search import OptimisticMirrorDescent, Simplex
from trimtab.rewards import RewardModel, WeightedReward

__all__ = ["WorstCaseWeights", "worst_case_weights"]


class WorstCaseWeights:
    """The state of max_z min_w sum_i w_i s_i (r_i(z) - r_i(z_0)), w on the simplex, for each sample of a run.

    z_0 is a sample's first noise and s_i the weights of a `WeightedReward`, here scales at which gains are compared.
    Each sample has a player of its own, `OptimisticMirrorDescent` with the entropic map, told the scaled gains of each
    noise whose gradient is taken: a batch gives what its items give. What a sample is worth is its smallest scaled
    gain.

    Source: two optimistic players, as in Chen et al. (arXiv 2302.04552); the noise's player is gradient ascent.

    Args:
        scales: by the rewards' names, none 0.
        samples: how many there are.
    """

    def __init__(self, scales: Mapping[str, float], samples: int) -> None:
        self.scales = dict(scales)
        options: dict[str, Any] = {"lipschitz": 1e-6, "adaptive_lipschitz": True}
        self.players = [OptimisticMirrorDescent(Simplex(len(scales)), **options) for _ in range(samples)]
        self.baselines: list[Tensor | None] = [None] * samples

    def __call__(self, terms: Mapping[str, Tensor], index: Sequence[int], learn: bool) -> tuple[Tensor, Tensor]:
        """What is climbed and what it is worth.

        Args:
            terms: the rewards' values by name, each (R,).
            index: each row's sample; the first row that a sample ever has is its z_0.
            learn: whether the players take this round, which needs one row a sample.

        Returns:
            sum_i w_i s_i r_i (R,) with its gradient, and the smallest gain (R,) without one.
        """
        scaled = torch.stack([scale * terms[name] for name, scale in self.scales.items()], 1)
        now = scaled.detach().double().cpu()
        for values, sample in zip(now, index, strict=True):
            if self.baselines[sample] is None:
                self.baselines[sample] = values
        gains = now - torch.stack([self.baselines[sample] for sample in index])
        if not learn:
            return scaled.sum(1), gains.amin(1).to(scaled)
        weights = torch.stack([self.players[sample].predict() for sample in index])
        for row, sample in zip(gains, index, strict=True):
            if bool(torch.isfinite(row).all()):
                self.players[sample].update(row)
        return (weights.to(scaled) * scaled).sum(1), gains.amin(1).to(scaled)

    def state_dict(self) -> dict[str, Any]:
        """What a run of the same samples goes on from."""
        return {"players": [player.state_dict() for player in self.players], "baselines": list(self.baselines)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: for the state of another number of samples or rewards.
        """
        if set(state) != {"players", "baselines"} or len(state["players"]) != len(self.players):
            raise ValueError(f"`state` is none of {len(self.players)} samples; takes a state_dict of as many")
        for player, saved in zip(self.players, state["players"], strict=True):
            player.load_state_dict(saved)
        self.baselines = list(state["baselines"])


def worst_case_weights(reward: RewardModel, samples: int) -> WorstCaseWeights | None:
    """The weights of a reward that asks for them; None for others."""
    if not isinstance(reward, WeightedReward) or reward.weighting != "worst-case":
        return None
    return WorstCaseWeights({name: weight for name, weight in reward.weights.items() if weight}, samples)
