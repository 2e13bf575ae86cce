"""DCT-AdamW: Adam's moments in a few columns of the cosine transform, chosen anew as the gradient turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_number

from .base import (
    TrainingOptimizer,
    adam_directions,
    add_updates,
    batches,
    check_finite,
    check_rates,
    checked_betas,
    state_dtype,
)
from .dct import BASES, ColumnSelection, basis_columns, project_back, select_columns
from .error_feedback import ERROR_FEEDBACK, load_error, store_error

__all__ = ["DCTAdamW"]


class DCTAdamW(TrainingOptimizer):
    """AdamW whose moments live in `rank` columns of the cosine transform; a matrix stores their indices alone.

        A = G + E;  I = the columns of B that A aligns with most;  P = B[:, I];  a = A P;  E = A - a P^T
        m <- b1 m R + (1 - b1) a,  v <- b2 |v R| + (1 - b2) a^2,  R = P_prev^T P
        theta <- (1 - lr weight_decay) theta - lr (m' / (sqrt v' + eps)) P^T

    R is a partial permutation, as all columns come from one orthogonal matrix: the moments of columns that stay are
    kept, those of new ones start at 0. Tall matrices are projected from the right, wide ones from the left; tensors of
    more dimensions as (n, -1). Vectors, matrices with min(n, m) <= `rank` or an axis of `max_dim`, and groups with
    ``projected=False`` get AdamW.

    Without error feedback the state is 2 rank max(n, m) numbers and `rank` indices. "full" feedback adds a float32 copy
    of the matrix: the saving is gone; "8bit" adds a quarter of that. On hidden axes without an order the cosine
    transform is no better than any other orthogonal matrix: its merit is that it needs no storage. Of no use for LoRA
    or a single latent.

    Experimental: no steady gain over AdamW or GaLore at tuned rates on small networks.

    Source: Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language
    Models" (v1: "SVD-Free Low-Rank Adaptive Gradient Optimization ..."), arXiv 2505.17967, DCT-AdamW.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate >= 0, a number or a tensor of one.
        rank: columns for each matrix, >= 1.
        betas: in [0, 1).
        eps: >= 0.
        weight_decay: decoupled, >= 0.
        update_gap: steps between two choices of columns.
        rotate: whether the moments follow the columns; otherwise they stay where they are, under other columns.
        error_feedback: None, "full", "8bit" or "4bit".
        basis: "dct"; "random" and "identity" to compare with.
        norm: 1 or 2, that ranks the columns: 2 is the contraction's, 1 the authors' code's.
        max_dim: an axis this long (an embedding's) is not projected.
        foreach: the moments of all tensors of a group at once; None on CUDA only.

    Raises:
        ValueError: a number out of range, another name.
        TypeError: something of another type.
        RuntimeError: at a step: a sparse gradient, complex parameters, or a gradient that is not finite; before any
            state changes.

    Warns:
        UserWarning: without `rotate` at an `update_gap` below 50, where moments of different columns mix.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = DCTAdamW([weight], lr=1e-2, rank=4)
        >>> (weight - 1).square().sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[weight].items()}
        {'step': (), 'indices': (4,), 'exp_avg': (64, 4), 'exp_avg_sq': (64, 4)}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rank: int = 128,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_gap: int = 1,
        rotate: bool = True,
        error_feedback: str | None = None,
        basis: str = "dct",
        norm: int = 2,
        max_dim: int = 32_000,
        foreach: bool | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**given, "projected": True})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rates(group)
        checked_betas(group["betas"])
        checked_number("eps", group["eps"], least=0)
        for name in ("rank", "update_gap", "max_dim"):
            checked_count(name, group[name])
        checked_choice("basis", group["basis"], BASES)
        if group["error_feedback"] not in ERROR_FEEDBACK:
            raise ValueError(f"`error_feedback` is {group['error_feedback']!r}; takes None, 'full', '8bit' or '4bit'")
        if group["norm"] not in (1, 2):
            raise ValueError(f"`norm` is {group['norm']}; takes 1 or 2")
        if not group["rotate"] and group["update_gap"] < 50:
            message = (
                "`rotate` is off: moments of different columns mix at each choice; `update_gap` should be 50 or more"
            )
            warnings.warn(message, UserWarning, stacklevel=4)

    @torch.compiler.disable  # which tensors take part depends on steps and data: a compiled loop runs this as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives the closure's loss, which is computed with gradients enabled."""
        loss = self._loss(closure)
        found = [(group, self._with_gradients(group)) for group in self.param_groups]
        check_finite(found, "DCTAdamW")
        for group, items in found:
            params = [p for _, p in items]
            for batch in batches(params, group["foreach"], params[0].device if params else None):
                self._update(group, batch)
        return loss

    def _update(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        gradients = []
        for p in params:
            state = self.state[p]
            state.setdefault("step", torch.tensor(0.0))
            state["step"] += 1
            gradient = self._reduced(group, p) if low_rank(group, p) else p.grad.to(state_dtype(p))
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            gradients.append(gradient)
        first, second = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        ages = [float(self.state[p]["step"]) for p in params]
        directions = adam_directions(gradients, first, second, ages, group["betas"], group["eps"])
        for place, p in enumerate(params):
            if low_rank(group, p):
                rows, columns = p.shape[0], p[0].numel()
                selection = ColumnSelection(self.state[p]["indices"], side_of(rows, columns))
                full = project_back(directions[place], selection, (rows, columns), basis=group["basis"])
                directions[place] = full.reshape(p.shape)
        add_updates(list(params), directions, group["lr"], group["weight_decay"])

    def _reduced(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """The gradient's coordinates in this step's columns; keeps what they leave, moves the moments."""
        state, kind = self.state[p], group["error_feedback"]
        matrix = p.grad.to(state_dtype(p)).reshape(len(p), -1)
        error = load_error(state, kind, matrix)
        matrix = matrix if error is None else matrix + error
        side = side_of(*matrix.shape)
        # Columns are chosen at the first step and then every `update_gap`; a zero matrix would choose any.
        due = (int(state["step"]) - 1) % group["update_gap"] == 0
        if "indices" not in state or (due and bool(matrix.any())):
            low, selection = select_columns(matrix, group["rank"], basis=group["basis"], p=group["norm"], side=side)
            if "indices" in state and group["rotate"]:
                _rotate(state, selection)
            state["indices"] = selection.indices
        else:
            selection = ColumnSelection(state["indices"], side)
            columns = basis_columns(selection.indices, min(matrix.shape), group["basis"], matrix.dtype)
            low = matrix @ columns.T if side == "right" else columns @ matrix
        if kind is not None:
            store_error(state, kind, matrix - project_back(low, selection, tuple(matrix.shape), basis=group["basis"]))
        return low.contiguous()


def side_of(rows: int, columns: int) -> str:
    """The projected side of a matrix: the shorter."""
    return "right" if rows >= columns else "left"


def low_rank(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter is projected; AdamW has the others."""
    if not group["projected"] or p.ndim < 2:
        return False
    rows, columns = p.shape[0], p[0].numel()
    return min(rows, columns) > group["rank"] and max(rows, columns) < group["max_dim"]


def _rotate(state: dict[str, Any], selection: ColumnSelection) -> None:
    """Moments of columns that stay selected go to their new places; the others start at 0."""
    same = state["indices"][:, None] == selection.indices[None]
    rotation = same.to(state["exp_avg"].dtype)
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state[name]
        moment.copy_(moment @ rotation if selection.side == "right" else rotation.T @ moment)
