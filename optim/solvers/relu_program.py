"""The convex program of a two-layer ReLU network: its data, its operators, and the network of a solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_choice, checked_number

from .activation_patterns import ActivationPatterns, two_layers, with_ones
from .relu_losses import LOSSES, Loss

__all__ = ["ConvexReLUResult", "ReLUProgram", "balanced", "network_of_neurons", "relu_objective"]


class ReLUProgram:
    """min l(F u) + beta sum_i (||v_i|| + ||w_i||) over cones, as operators on u = (v, w) of shape (2, P, d).

    F u = sum_i D_i X (v_i - w_i), or differences of its rows where there are pairs; G u stacks (2 D_i - I) X v_i and
    the same of w_i, (2, P, n). With `epsilon` the spread of output k is epsilon ||T_k||_1, T_k = sum_i d_ik (v_i - w_i)
    without the biases' entries.

    Args:
        X: (n, d) floating, the data.
        y: (n,) targets, -1 or +1 for a loss of labels; None with `pairs`.
        patterns: over these rows.
        beta: > 0, weight decay.
        loss: "squared", "hinge" or "logistic".
        pairs: (m, 2) int64, rows of which the first is preferred: l is of the difference of their outputs, y is 1.
        bias: neurons have one.
        epsilon: >= 0, radius of the box.
        offset: added to every output: the last layer's bias, which is not fitted.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor | None,
        patterns: ActivationPatterns,
        *,
        beta: float,
        loss: str,
        pairs: Tensor | None,
        bias: bool,
        epsilon: float,
        offset: float = 0.0,
    ) -> None:
        self.beta = checked_number("beta", beta, above=0)
        self.epsilon = checked_number("epsilon", epsilon, least=0)
        self.X, self.columns, self.bias = with_ones(X, bias), X.shape[1], bias
        self.loss: Loss = LOSSES[checked_choice("loss", loss, tuple(LOSSES))]
        self.pairs = checked_pairs(pairs, len(X))
        self.y = checked_targets(y, self.pairs, self.loss, self.X)
        self.offset = 0.0 if self.pairs is not None else offset
        if not len(patterns) or patterns.active.shape[1] != len(X) or patterns.normals.shape[1] != self.X.shape[1]:
            raise ValueError(
                f"`patterns` has shapes {tuple(patterns.active.shape)} and {tuple(patterns.normals.shape)}; takes "
                f"(P, {len(X)}) and (P, {self.X.shape[1]}) with P >= 1"
            )
        self.patterns = patterns
        self.active = patterns.active.to(self.X)
        self.signs = 2 * self.active - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of u: (2, P, d)."""
        return (2, len(self.active), self.X.shape[1])

    def cones(self, u: Tensor) -> Tensor:
        """G u, (2, P, n)."""
        return self.signs * (u @ self.X.T)

    def cones_adjoint(self, s: Tensor) -> Tensor:
        """G^T s, (2, P, d)."""
        return (self.signs * s) @ self.X

    def outputs(self, z: Tensor) -> Tensor:
        """F u of z = v - w (P, d): (m,)."""
        return self.read(torch.einsum("pn,pn->n", self.active, z @ self.X.T))

    def outputs_adjoint(self, a: Tensor) -> Tensor:
        """F^T's part for v, (P, d); that for w is its negative."""
        return (self.active * self.unread(a)) @ self.X

    def spread(self, z: Tensor) -> Tensor:
        """T of z: (m, sides, columns), one side, or two where there are pairs."""
        rows = self.active.T @ z[:, : self.columns]
        return rows[:, None] if self.pairs is None else rows[self.pairs]

    def spread_adjoint(self, T: Tensor) -> Tensor:
        """(P, d) of (m, sides, columns)."""
        if self.pairs is None:
            rows = T[:, 0]
        else:
            rows = T.new_zeros(len(self.X), T.shape[-1]).index_add_(0, self.pairs.flatten(), T.flatten(0, 1))
        z = self.active @ rows
        return torch.cat([z, z.new_zeros(len(z), self.X.shape[1] - self.columns)], 1)

    def read(self, f: Tensor) -> Tensor:
        """What the loss sees of the rows' outputs (n,): these or their differences."""
        return f if self.pairs is None else f[self.pairs[:, 0]] - f[self.pairs[:, 1]]

    def unread(self, a: Tensor) -> Tensor:
        """The adjoint of `read`."""
        if self.pairs is None:
            return a
        f = a.new_zeros(len(self.X))
        return f.index_add_(0, self.pairs[:, 0], a).index_add_(0, self.pairs[:, 1], -a)

    def loss_of(self, u: Tensor) -> Tensor:
        """l(F u), of the worst point of the boxes where there are any."""
        z = u[0] - u[1]
        spread = self.epsilon * self.spread(z).abs().sum((1, 2)) if self.epsilon else None
        return self.loss.value(self.loss.margin(self.outputs(z) + self.offset, self.y, spread)).sum()

    def objective(self, u: Tensor) -> float:
        """The program's objective, wherever u lies."""
        return float(self.loss_of(u) + self.beta * u.norm(dim=2).sum())

    def violation(self, u: Tensor) -> float:
        """How far u is outside of its cones: the largest negative entry, 0 inside."""
        level = self.epsilon * u[..., : self.columns].abs().sum(-1)
        return max(0.0, float((level[..., None] - self.cones(u)).max()))


@dataclass(frozen=True)
class ConvexReLUResult:
    """A solution of the program.

    Attributes:
        v: (P, d), neurons with a positive output weight, and
        w: (P, d), with a negative one; biases are the last column.
        objective: the program's.
        lower_bound: the dual's, by a feasible dual point: the optimum over these patterns lies between them. -inf for
            the robust forms, where it is not computed.
        violation: the largest violation of a cone by (v, w); 0 for the plain forms, where it was repaired.
        num_iterations: of ADMM.
        converged: both residuals reached the tolerance.
        history: objectives along the way, one an iteration.
        residuals: the larger of both relative residuals, one an iteration.
        unrepaired: (2, P, d), ADMM's own (v, w), which violates cones by about its residual.
        num_inner_iterations: steps of the inner solver in all; 0 for a factorization.
        bias: whether the last column is a bias.
        offset: the bias of the last layer, which was given.
    """

    v: Tensor
    w: Tensor
    objective: float
    lower_bound: float
    violation: float
    num_iterations: int
    converged: bool
    history: list[float] = field(repr=False)
    residuals: list[float] = field(repr=False)
    unrepaired: Tensor = field(repr=False)
    num_inner_iterations: int = 0
    bias: bool = True
    offset: float = 0.0

    @property
    def duality_gap(self) -> float:
        """`objective` - `lower_bound`: how much the optimum over these patterns can still be below."""
        return self.objective - self.lower_bound

    def to_module(self, dtype: torch.dtype = torch.float64, *, repaired: bool = True) -> nn.Sequential:
        """The network: (u, alpha) = (v_i / sqrt||v_i||, sqrt||v_i||) and (w_i / sqrt||w_i||, -sqrt||w_i||).

        Neurons that are 0 are left out; if all are, one with weights 0 stands for them. Of an ADMM run that was stopped
        early, the network of `unrepaired` can be better, as repairing thin cones costs: then `repaired=False`.
        """
        neurons = torch.cat([self.v, self.w]) if repaired else self.unrepaired.flatten(0, 1)
        out = torch.cat([torch.ones(len(self.v)), -torch.ones(len(self.w))]).to(neurons)
        size = neurons.norm(dim=1)
        used = size > 0
        scale = size[used].sqrt()
        return network_of_neurons(neurons[used] / scale[:, None], out[used] * scale, self.bias, self.offset, dtype)


def network_of_neurons(
    inputs: Tensor, outputs: Tensor, bias: bool, offset: float = 0.0, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Linear, ReLU, Linear of neurons (m, d) and their output weights (m,); the last column is a bias if `bias`."""
    if not len(inputs):
        inputs, outputs = inputs.new_zeros(1, inputs.shape[1]), outputs.new_zeros(1)
    columns = inputs.shape[1] - bias
    first = nn.Linear(columns, len(inputs), bias=bias, dtype=dtype, device=inputs.device)
    last = nn.Linear(len(inputs), 1, bias=offset != 0, dtype=dtype, device=inputs.device)
    with torch.no_grad():
        first.weight.copy_(inputs[:, :columns])
        if bias:
            first.bias.copy_(inputs[:, -1])
        last.weight.copy_(outputs[None])
        if offset != 0:
            last.bias.fill_(offset)
    return nn.Sequential(first, nn.ReLU(), last)


def _neurons(module: nn.Sequential, X: Tensor) -> tuple[Tensor, Tensor, bool, float]:
    first, last = two_layers(module, X)
    weight = first.weight if first.bias is None else torch.cat([first.weight, first.bias[:, None]], 1)
    offset = 0.0 if last.bias is None else last.bias.item()
    return weight.detach().double(), last.weight.detach().double()[0], first.bias is not None, offset


def balanced(module: nn.Sequential, X: Tensor) -> nn.Sequential:
    """The same function with ||u_j|| = |alpha_j| for each neuron, where the weight decay is least; float64."""
    u, alpha, bias, offset = _neurons(module, X)
    size = u.norm(dim=1)
    used = (size > 0) & (alpha != 0)
    scale = (alpha[used].abs() / size[used]).sqrt()
    return network_of_neurons(u[used] * scale[:, None], alpha[used] / scale, bias, offset)


def relu_objective(
    module: nn.Sequential,
    X: Tensor,
    y: Tensor | None,
    *,
    beta: float,
    loss: str = "squared",
    pairs: Tensor | None = None,
) -> float:
    """The networks' own objective sum_k loss_k + beta/2 sum_j (||u_j||^2 + alpha_j^2), biases of neurons in u_j.

    Args:
        module: Linear, ReLU, Linear.
        X: (n, d) floating.
        y: (n,) targets, or None with `pairs`.
        beta: weight decay, > 0.
        loss: "squared" (half the square), "hinge" or "logistic".
        pairs: (m, 2), rows of which the first is preferred.

    Raises:
        ValueError: arguments that do not fit.
    """
    beta = checked_number("beta", beta, above=0)
    kind = LOSSES[checked_choice("loss", loss, tuple(LOSSES))]
    u, alpha, bias, offset = _neurons(module, X)
    A = with_ones(X, bias)
    pairs = checked_pairs(pairs, len(X))
    target = checked_targets(y, pairs, kind, A)
    f = (A @ u.T.to(A)).clamp_min(0) @ alpha.to(A) + offset
    a = f if pairs is None else f[pairs[:, 0]] - f[pairs[:, 1]]
    decay = beta / 2 * (u.square().sum() + alpha.square().sum())
    return float(kind.value(kind.margin(a, target)).sum() + decay)


def checked_pairs(pairs: Any, rows: int) -> Tensor | None:
    """(m, 2) int64 rows, two different ones each; raises ValueError otherwise."""
    if pairs is None:
        return None
    if not isinstance(pairs, Tensor) or pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        got = f"shape {tuple(pairs.shape)}" if isinstance(pairs, Tensor) else f"a {type(pairs).__name__}"
        raise ValueError(f"`pairs` has {got}; takes a tensor (m, 2) of row numbers with m >= 1")
    if pairs.is_floating_point() or int(pairs.min()) < 0 or int(pairs.max()) >= rows:
        raise ValueError(f"`pairs` has rows {int(pairs.min())} to {int(pairs.max())}; takes integers 0 to {rows - 1}")
    if bool((pairs[:, 0] == pairs[:, 1]).any()):
        raise ValueError("`pairs` has a row preferred to itself")
    return pairs.long()


def checked_targets(y: Any, pairs: Tensor | None, loss: Loss, X: Tensor) -> Tensor:
    """(m,) float64 targets: labels -1 and +1 for a loss of labels, and 1 for pairs; raises ValueError otherwise."""
    if pairs is not None:
        if y is not None or not loss.labels:
            raise ValueError("`pairs` takes y=None and the loss 'logistic' or 'hinge'")
        return X.new_ones(len(pairs))
    if not isinstance(y, Tensor) or y.shape != X.shape[:1]:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"`y` has {got}; takes a tensor ({len(X)},)")
    y = y.detach().to(X)
    if not bool(torch.isfinite(y).all()):
        raise ValueError("`y` has entries that are not finite")
    if loss.labels and sorted(set(y.tolist())) != [-1.0, 1.0]:
        raise ValueError(
            f"`y` has the values {sorted(set(y.tolist()))[:5]}; {loss.name!r} takes -1 and 1, both of them"
        )
    return y
