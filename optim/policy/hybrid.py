"""Demonstrations where a policy fails, its own rollouts where it doesn't: the gate of hybrid post-training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_number

__all__ = ["SOFT_TABLE", "HybridGate", "HybridLoss", "hybrid_loss"]

SOFT_TABLE = ((0.0, 1.0), (0.0, 1.0), (0.125, 0.5), (0.25, 0.25), (0.5, 0.125)) + ((1.0, 0.0),) * 4


class HybridGate:
    """Weights of rollouts and demonstration for each prompt, by the share of its rollouts that succeeded.

    Hard: (alpha, beta) = (0, 1) where successes / counts <= threshold, else (1, 0). Ask it before a graph is built:
    rollouts of prompts that take their demonstration need none.

    Source: Lv et al., "Towards a Unified View of Large Language Model Post-Training", arXiv 2509.04419, the switch of
    HPT; the soft one is in their code and not what they report. A demonstration that is wrong for its prompt goes on
    being imitated as long as no rollout succeeds: `max_demo_uses`, which is not the paper's, ends that.

    Args:
        threshold: in [0, 1]: 0 takes the demonstration only where all failed, 0.25 at two of eight.
        mode: "hard" or "soft".
        table: of "soft": (alpha, beta) for 0, 1, ... n successes of n; None is `SOFT_TABLE`, for 8.
        max_demo_uses: how often a prompt may take its demonstration, >= 1; None is always. Needs `prompts`.

    Raises:
        ValueError, TypeError: an argument out of range.

    Example:
        >>> alpha, beta = HybridGate()(torch.tensor([0, 1, 8]), torch.tensor([8, 8, 8]))
        >>> beta.tolist()
        [1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        threshold: float = 0.0,
        *,
        mode: str = "hard",
        table: Sequence[tuple[float, float]] | None = None,
        max_demo_uses: int | None = None,
    ) -> None:
        self.threshold = checked_number("threshold", threshold, least=0)
        if threshold > 1:
            raise ValueError(f"`threshold` is {threshold}; takes a share in [0, 1]")
        self.mode = checked_choice("mode", mode, ("hard", "soft"))
        self.table = torch.tensor(SOFT_TABLE if table is None else table, dtype=torch.float32)
        if self.table.ndim != 2 or self.table.shape[1] != 2 or bool((self.table < 0).any()):
            raise ValueError("`table` is no list of pairs of weights >= 0, (rollouts, demonstration)")
        self.max_demo_uses = None if max_demo_uses is None else checked_count("max_demo_uses", max_demo_uses)
        self._uses: Counter[int] = Counter()

    def __call__(
        self,
        successes: Tensor,
        counts: Tensor,
        *,
        has_demo: Tensor | None = None,
        prompts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weights of P prompts.

        Args:
            successes: (P,), rollouts that succeeded, 0 to `counts`.
            counts: (P,), rollouts, >= 1.
            has_demo: (P,) bool: prompts without a demonstration have (1, 0). None is all True.
            prompts: (P,), a number that names each prompt, for `max_demo_uses`.

        Returns:
            alpha and beta, (P,) float32.

        Raises:
            ValueError: shapes that don't fit, counts of 0, more successes than counts, or of "soft" another number of
                rollouts than its table's.
        """
        successes, counts = torch.as_tensor(successes), torch.as_tensor(counts)
        if successes.ndim != 1 or counts.shape != successes.shape:
            raise ValueError(f"`counts` has shape {tuple(counts.shape)}; takes (P,), that of `successes`")
        if bool((counts < 1).any()) or bool((successes < 0).any()) or bool((successes > counts).any()):
            raise ValueError("`successes` and `counts` don't fit; takes 0 <= successes <= counts, counts >= 1")
        if self.mode == "soft":
            if bool((counts != len(self.table) - 1).any()):
                raise ValueError(f"`counts` has others than {len(self.table) - 1}, the rollouts of the soft table")
            alpha, beta = self.table.to(successes.device)[successes.long()].unbind(1)
        else:
            beta = (successes.double() <= self.threshold * counts.double() + 1e-9).float()
            alpha = 1 - beta
        allowed = torch.ones_like(beta, dtype=torch.bool) if has_demo is None else torch.as_tensor(has_demo).bool()
        if self.max_demo_uses is not None:
            allowed = allowed & self._count(beta * allowed, prompts)
        return torch.where(allowed, alpha, torch.ones_like(alpha)), torch.where(allowed, beta, torch.zeros_like(beta))

    def _count(self, beta: Tensor, prompts: Sequence[int] | None) -> Tensor:
        """Which prompts have uses left; counts one for each that takes its demonstration."""
        if prompts is None or len(prompts) != len(beta):
            raise ValueError("`prompts` doesn't name each prompt; takes P numbers with max_demo_uses")
        left = []
        for prompt, weight in zip(torch.as_tensor(prompts).tolist(), beta.tolist(), strict=True):
            left.append(self._uses[prompt] < self.max_demo_uses)
            self._uses[prompt] += weight > 0 and left[-1]
        return torch.tensor(left, device=beta.device)

    def state_dict(self) -> dict[str, Any]:
        """How often each prompt took its demonstration."""
        return {"uses": {str(prompt): uses for prompt, uses in self._uses.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._uses = Counter({int(prompt): uses for prompt, uses in state["uses"].items()})


@dataclass(frozen=True)
class HybridLoss:
    """A loss over prompts.

    Attributes:
        loss: scalar with a graph, also where nothing counts.
        demo_fraction: share of the prompts that take their demonstration in full or in part.
        alpha: (P,), weight of the rollouts.
        beta: (P,), of the demonstration.
    """

    loss: Tensor
    demo_fraction: float
    alpha: Tensor
    beta: Tensor


def hybrid_loss(
    rl: Tensor,
    demo_nll: Tensor,
    successes: Tensor,
    counts: Tensor,
    *,
    gate: HybridGate,
    demo_coef: float = 1.0,
    has_demo: Tensor | None = None,
    prompts: Sequence[int] | None = None,
) -> HybridLoss:
    """mean over prompts of alpha L_RL + demo_coef beta L_SFT: hybrid post-training (HPT).

    Source: arXiv 2509.04419. The paper's L_RL is Dr. GRPO's, `unified_policy_loss(..., reduction="constant")`, and its
    L_SFT the mean over tokens; of a flow the matching loss takes that place.

    Args:
        rl: (P,), each prompt's loss of its rollouts, with a graph; any finite number where the gate is closed.
        demo_nll: (P,), each prompt's loss of its demonstration, likewise.
        successes: (P,) as in `HybridGate`.
        counts: (P,) likewise.
        gate: gives alpha and beta.
        demo_coef: > 0: the two losses are on different scales.
        has_demo: (P,) bool.
        prompts: (P,) numbers, for the gate's `max_demo_uses`.

    Returns:
        Loss and weights.

    Raises:
        ValueError: shapes that don't fit, and as the gate.
    """
    checked_number("demo_coef", demo_coef, above=0)
    for name, value in (("rl", rl), ("demo_nll", demo_nll)):
        if value.ndim != 1 or not len(value) or len(value) != len(successes):
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; takes (P,), P >= 1, one number for each prompt")
    alpha, beta = (w.to(rl) for w in gate(successes, counts, has_demo=has_demo, prompts=prompts))
    loss = (alpha * rl + demo_coef * beta * demo_nll).mean()
    return HybridLoss(loss, float((beta > 0).float().mean()), alpha, beta)
