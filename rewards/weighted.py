"""A weighted sum of rewards."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import RewardModel

__all__ = ["PRESETS", "WeightedReward"]

PRESETS: dict[str, dict[str, float]] = {
    # The weights of ReNO (Eyring et al., arXiv 2406.04312), which sum losses of the same rewards.
    "reno": {"hpsv2.1": 5.0, "imagereward": 1.0, "pickscore": 0.05, "clip": 0.01},
}


class WeightedReward(RewardModel):
    """sum_i w_i r_i, with the values r_i in reports.

    A reward of weight 0 is reported and has no part in the value or its gradient.

    With `weighting="worst-case"` the value is min_i w_i r_i, and noise optimization raises the smallest gain
    w_i (r_i - r_i at the start): an adversary moves each sample's weights to the rewards that gain least, so that none
    is sacrificed for another (`trimtab.pipelines.noise_weights`). The w_i are then scales at which gains are compared.

    Args:
        rewards: weights by the names that `load_reward` takes, or pairs of a reward (or its name) and a weight.
            Weights are finite and at least one is > 0; a negative one makes a penalty.
        weighting: "sum", or "worst-case" for two or more rewards whose weight is not 0.
        name: in reports.
        device: where rewards given by name are loaded to.
        dtype: of the weights of rewards given by name.

    Raises:
        ValueError: if no weight is > 0, one is not finite, two rewards have one name, or `weighting` is another.
        TypeError: if something is neither a reward nor a name.

    Example:
        >>> from trimtab.rewards import CallableReward
        >>> bright = CallableReward(lambda images, prompts: images.mean((1, 2, 3)), True, name="bright")
        >>> reward = WeightedReward([(bright, 2.0)])
        >>> value, terms = reward(torch.full((1, 3, 4, 4), 0.25), "a cat", return_terms=True)
        >>> value.item(), terms["bright"].item()
        (0.5, 0.25)
    """

    def __init__(
        self,
        rewards: Mapping[str, float] | Sequence[tuple[RewardModel | str, float]],
        *,
        weighting: Literal["sum", "worst-case"] = "sum",
        name: str = "weighted",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        pairs = list(rewards.items()) if isinstance(rewards, Mapping) else list(rewards)
        weights = [_checked_weight(weight) for _, weight in pairs]
        if not any(weight > 0 for weight in weights):
            raise ValueError(f"`rewards` has the weights {weights}; takes at least one > 0")
        if weighting not in ("sum", "worst-case"):
            raise ValueError(f"`weighting` is {weighting!r}; takes 'sum' or 'worst-case'")
        if weighting == "worst-case" and sum(map(bool, weights)) < 2:
            raise ValueError(f"`rewards` has the weights {weights}; 'worst-case' takes at least two that are not 0")
        if strange := [reward for reward, _ in pairs if not isinstance(reward, (RewardModel, str))]:
            raise TypeError(f"`rewards` has a {type(strange[0]).__name__}; takes rewards and names of rewards")
        from .load import load_reward

        loaded = [load_reward(r, device=device, dtype=dtype) if isinstance(r, str) else r for r, _ in pairs]
        names = [reward.name for reward in loaded]
        if len(set(names)) < len(names):
            raise ValueError(f"`rewards` has the names {names}; takes names that differ, for reports")
        self.name, self.weighting = name, weighting
        self.weights = dict(zip(names, weights, strict=True))
        self.rewards = nn.ModuleList(loaded)
        self.differentiable = all(r.differentiable for r in loaded if self.weights[r.name])

    def terms(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Each reward's value (B,)."""
        found: dict[str, Tensor] = {}
        for reward in self.rewards:
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.weights[reward.name])):
                found[reward.name] = reward(images, prompts)
        return found

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum (B,), or the smallest of its terms."""
        scaled = torch.stack([self.weights[name] * value for name, value in terms.items() if self.weights[name]])
        return scaled.sum(0) if self.weighting == "sum" else scaled.amin(0)


def _checked_weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"`rewards` has the weight {weight!r}; takes finite numbers")
    return float(weight)
