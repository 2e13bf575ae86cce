"""Rewards to advantages: within a group, against the others of it, against what was seen before."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number

__all__ = ["RewardThreshold", "RunningRewardStats", "group_advantages", "group_index", "leave_one_out_advantage"]


def group_advantages(
    rewards: Tensor, groups: Tensor | Sequence[int], *, std: bool = False, eps: float = 1e-6
) -> Tensor:
    """r - mean of its group, and with `std` divided by (standard deviation of the group + eps).

    Dr. GRPO's advantages (arXiv 2503.20783) without `std`, GRPO's (arXiv 2402.03300) with it: the unbiased deviation,
    as in trl.

    Args:
        rewards: (B,), finite.
        groups: (B,), a number for each group, such as its prompt's, in any order.
        std: whether to divide.
        eps: >= 0.

    Returns:
        (B,); 0 in a group of equal rewards.

    Raises:
        ValueError: for shapes that don't fit, rewards that are not finite, or with `std` a group of one.

    Example:
        >>> group_advantages(torch.tensor([1.0, 5.0, 3.0]), [0, 1, 0]).tolist()
        [-1.0, 0.0, 1.0]
    """
    rewards, index, counts = _grouped(rewards, groups)
    checked_number("eps", eps, least=0)
    centred = rewards - _means(rewards, index, counts)[index]
    if not std:
        return centred
    if int(counts.min()) < 2:
        raise ValueError("`groups` has a group of one; takes groups of two and more with std=True")
    variance = torch.zeros_like(counts, dtype=rewards.dtype).index_add(0, index, centred.square()) / (counts - 1)
    return centred / (variance.sqrt() + eps)[index]


def leave_one_out_advantage(
    rewards: Tensor, groups: Tensor | Sequence[int] | None = None, *, std: bool = False
) -> Tensor:
    """r less the mean reward of the others of its group: a baseline that leaves the policy gradient unbiased.

    Args:
        rewards: (B,), finite.
        groups: (B,) as in `group_advantages`; None is one group.
        std: whether to divide by the group's unbiased standard deviation (+ 1e-6), which biases.

    Returns:
        (B,).

    Raises:
        ValueError: for a group of one, or as in `group_advantages`.

    Example:
        >>> leave_one_out_advantage(torch.tensor([0.0, 1.0, 2.0])).tolist()
        [-1.5, 0.0, 1.5]
    """
    groups = torch.zeros(len(rewards), dtype=torch.long) if groups is None else groups
    centred, index, counts = _grouped(rewards, groups)
    if int(counts.min()) < 2:
        raise ValueError("`rewards` has a group of one; takes at least two rewards in each group")
    size = counts[index].to(rewards.dtype)
    return group_advantages(rewards, groups, std=std) * size / (size - 1)


class RunningRewardStats:
    """Advantages by the mean and deviation of a prompt's last rewards: DDPO's tracker (arXiv 2305.13301).

    Args:
        buffer_size: rewards kept for each group, >= 1.
        min_count: as long as a group has fewer, the batch's own mean and deviation serve it, >= 1.
        eps: added to the deviation, >= 0.

    Raises:
        ValueError, TypeError: a number out of range.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16, eps: float = 1e-6) -> None:
        self.buffer_size = checked_count("buffer_size", buffer_size)
        self.min_count = checked_count("min_count", min_count)
        self.eps = checked_number("eps", eps, least=0)
        self._buffers: dict[int, deque[float]] = {}

    def update(self, rewards: Tensor, groups: Tensor | Sequence[int]) -> Tensor:
        """Takes new rewards (B,) of `groups` (B,) in and gives their advantages (B,)."""
        rewards = _grouped(rewards, groups)[0]
        keys = torch.as_tensor(groups).tolist()
        for reward, key in zip(rewards.tolist(), keys, strict=True):
            self._buffers.setdefault(key, deque(maxlen=self.buffer_size)).append(reward)
        centres, scales = torch.empty_like(rewards), torch.empty_like(rewards)
        for row, key in enumerate(keys):
            buffer = self._buffers[key]
            known = rewards if len(buffer) < self.min_count else torch.tensor(list(buffer), dtype=rewards.dtype)
            centres[row], scales[row] = known.mean(), known.std(correction=0) + self.eps
        return (rewards - centres) / scales

    def state_dict(self) -> dict[str, Any]:
        """The rewards kept, as lists."""
        return {"buffers": {str(key): list(buffer) for key, buffer in self._buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._buffers = {int(k): deque(values, maxlen=self.buffer_size) for k, values in state["buffers"].items()}


class RewardThreshold:
    """Success of a continuous reward: at least a quantile of the rewards that the first policy had for its prompt.

    Args:
        quantile: in [0, 1].

    Raises:
        ValueError, TypeError: a number out of range.
    """

    def __init__(self, quantile: float = 0.9) -> None:
        self.quantile = checked_number("quantile", quantile, least=0)
        if quantile > 1:
            raise ValueError(f"`quantile` is {quantile}; takes a number in [0, 1]")
        self._rewards: dict[int, list[float]] = {}

    def update(self, rewards: Tensor, groups: Tensor | Sequence[int]) -> None:
        """Takes rewards (B,) of `groups` (B,) as known."""
        rewards = _grouped(rewards, groups)[0]
        for reward, key in zip(rewards.tolist(), torch.as_tensor(groups).tolist(), strict=True):
            self._rewards.setdefault(key, []).append(reward)

    def __call__(self, rewards: Tensor, groups: Tensor | Sequence[int]) -> Tensor:
        """(B,) bool: whether each reward is a success; a group without rewards has the quantile of all.

        Raises:
            ValueError: before the first `update`.
        """
        if not self._rewards:
            raise ValueError("RewardThreshold knows no rewards; takes an update() first")
        rewards = _grouped(rewards, groups)[0]
        every = [reward for known in self._rewards.values() for reward in known]
        limits = [
            torch.tensor(self._rewards.get(key, every), dtype=rewards.dtype).quantile(self.quantile)
            for key in torch.as_tensor(groups).tolist()
        ]
        return rewards >= torch.stack(limits).to(rewards.device)

    def state_dict(self) -> dict[str, Any]:
        """The rewards known, as lists."""
        return {"rewards": {str(key): list(known) for key, known in self._rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._rewards = {int(key): list(known) for key, known in state["rewards"].items()}


def group_index(groups: Tensor | Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Each row's place among the groups, (B,), and how many rows each group has.

    Raises:
        ValueError: for another number of rows, or numbers that are no integers.
    """
    groups = torch.as_tensor(groups)
    if groups.shape != (rows,) or groups.is_floating_point():
        raise ValueError(f"`groups` has shape {tuple(groups.shape)} and {groups.dtype}; takes {rows} integers")
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, counts


def _grouped(rewards: Tensor, groups: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(rewards, Tensor) or rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"`rewards` has shape {tuple(getattr(rewards, 'shape', ()))}; takes (B,), B >= 1")
    rewards = rewards.detach()
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("`rewards` has values that are not finite; takes finite ones")
    index, counts = group_index(groups, len(rewards))
    return rewards, index.to(rewards.device), counts.to(rewards.device)


def _means(rewards: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    return torch.zeros_like(counts, dtype=rewards.dtype).index_add(0, index, rewards) / counts
