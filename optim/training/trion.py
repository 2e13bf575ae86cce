"""Trion: Muon on a few columns of the cosine transform."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count

from .base import TrainingOptimizer, add_updates, check_finite, check_rates, checked_fraction, label, state_dtype
from .dct import project_back, select_columns
from .orthogonalize import SCALES, fast_dtype, newton_schulz, step_scale

__all__ = ["Trion"]


class Trion(TrainingOptimizer):
    """Muon whose momentum is orthogonalised in the `rank` columns of the cosine transform that it aligns with most.

        M <- M + G;  m = (M B)[:, I], I the columns of largest norm;  P = B[:, I]
        M <- M - (1 - mu) m P^T;  theta <- (1 - lr weight_decay) theta - lr s NewtonSchulz(m) P^T

    Momentum decays only where it was sent and so is its own error feedback. The state is Muon's, one copy of the
    weights: what is gained is the cost of orthogonalising and, across processes, of communicating r columns.

    Experimental: it trails Muon in the paper too; it was measured on small networks only.

    Source: Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
    Models", arXiv 2505.17967, Trion.

    Args:
        params: matrices, named or in groups; leave the rest of a model to AdamW, as for torch.optim.Muon.
        lr: learning rate >= 0, a number or a tensor of one.
        rank: columns for each matrix, >= 1; all where a matrix has no more.
        momentum: mu, in [0, 1).
        weight_decay: decoupled, >= 0.
        ns_steps: iterations of Newton and Schulz.
        scale: s, by `step_scale`: "match_rms_adamw", "original", "dion" or "none".
        norm: 1 or 2, that ranks the columns.
        ns_dtype: of the iterations; None is bfloat16 where the device has it.

    Raises:
        ValueError: a number out of range, another name, a parameter that is no matrix.
        TypeError: something of another type.
        RuntimeError: at a step: a sparse gradient, complex parameters, or a gradient that is not finite; before any
            state changes.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = Trion([weight], rank=4)
        >>> (weight - torch.eye(64, 32)).square().sum().backward()
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-3))
        4
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.02,
        *,
        rank: int = 128,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        scale: str = "match_rms_adamw",
        norm: int = 2,
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, given)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rates(group)
        checked_fraction("momentum", group["momentum"])
        checked_count("rank", group["rank"])
        checked_count("ns_steps", group["ns_steps"], least=0)
        checked_choice("scale", group["scale"], SCALES)
        if group["norm"] not in (1, 2):
            raise ValueError(f"`norm` is {group['norm']}; takes 1 or 2")
        for number, p in enumerate(group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Trion takes matrices only; {label(group, number)} is none")

    @torch.compiler.disable  # which tensors take part depends on steps and data: a compiled loop runs this as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives the closure's loss, which is computed with gradients enabled."""
        loss = self._loss(closure)
        found = [(group, self._with_gradients(group)) for group in self.param_groups]
        check_finite(found, "Trion")
        for group, items in found:
            for _, p in items:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p, dtype=state_dtype(p))
                direction = _direction(group, state["momentum_buffer"].add_(p.grad))
                add_updates([p], [direction], group["lr"], group["weight_decay"])
        return loss


def _direction(group: dict[str, Any], momentum: Tensor) -> Tensor:
    """The scaled orthogonal step of a matrix; lets the momentum that it sends decay."""
    rank = min(group["rank"], *momentum.shape)
    low, selection = select_columns(momentum, rank, p=group["norm"])
    momentum.sub_(project_back(low, selection, tuple(momentum.shape)), alpha=1 - group["momentum"])
    dtype = group["ns_dtype"] or fast_dtype(momentum.device)
    orthogonal = newton_schulz(low, group["ns_steps"], dtype=dtype).to(momentum.dtype)
    return project_back(orthogonal, selection, tuple(momentum.shape)) * step_scale(group["scale"], *momentum.shape)
