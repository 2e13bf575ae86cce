"""LV-HBA: constrained bilevel problems in one loop of gradient steps, without Hessians."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number, checked_point, checked_vector

__all__ = ["LVHBA", "BilevelProblem", "BilevelResult", "lv_hba"]

_STATE = ("k", "x", "y", "theta", "lam", "z")


@dataclass(frozen=True)
class BilevelProblem:
    """min F(x, y) over y in argmin_y { f(x, y) : g(x, y) <= 0 }.

    Attributes:
        upper: F, (x, y) to a scalar.
        lower: f, likewise; convex in y.
        constraint: g, (x, y) to (l,), convex in y; None has none.
        project_xy: on {g(x, y) <= 0} and the sets of x and y; needed where g depends on x. None projects y alone.
        project_y: on the set of y; None is the identity.
        equality: g = 0 rather than <= 0.
    """

    upper: Callable[[Tensor, Tensor], Tensor]
    lower: Callable[[Tensor, Tensor], Tensor]
    constraint: Callable[[Tensor, Tensor], Tensor] | None = None
    project_xy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    project_y: Callable[[Tensor], Tensor] | None = None
    equality: bool = False


@dataclass(frozen=True)
class BilevelResult:
    """Where the loop ended.

    Attributes:
        x: upper variable.
        y: lower variable.
        theta: the running minimizer of the lower level.
        lam: (l,) the running multiplier, of g as it is given.
        z: (l,) its proximal centre.
        upper: F(x, y).
        gap: f(x, y) - f(x, theta) - lam^T g(x, theta), the live estimate of the lower level's suboptimality.
        violation: the largest entry of g above 0, or of |g| for equalities.
        steps: made.
    """

    x: Tensor
    y: Tensor
    theta: Tensor
    lam: Tensor
    z: Tensor
    upper: float
    gap: float
    violation: float
    steps: int


class LVHBA:
    """The loop of `lv_hba`, a step at a time; arguments are those.

    Attributes:
        k: steps made.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        x0: Tensor,
        y0: Tensor,
        *,
        alpha: float = 0.02,
        beta: float = 0.05,
        eta: float = 0.02,
        gamma1: float = 2.0,
        gamma2: float = 0.1,
        c0: float = 1.0,
        p: float = 0.3,
        r: float = 1e3,
        gauss_seidel: bool = True,
        normalize_constraints: bool = False,
        theta0: Tensor | None = None,
        lam0: Tensor | None = None,
    ) -> None:
        given = {"alpha": alpha, "beta": beta, "eta": eta, "gamma1": gamma1, "gamma2": gamma2, "c0": c0, "r": r}
        for name, value in given.items():
            setattr(self, name, checked_number(name, value, above=0))
        if not 0 < checked_number("p", p) < 0.5:
            raise ValueError(f"`p` is {p}; takes a number in (0, 1/2)")
        self.problem, self.p, self.gauss_seidel, self.k = problem, p, gauss_seidel, 0
        self.x, self.y = checked_point("x0", x0).clone(), checked_point("y0", y0).clone()
        self.theta = self.y.clone() if theta0 is None else checked_point("theta0", theta0).to(self.y).clone()
        if self.theta.shape != self.y.shape:
            raise ValueError(f"`theta0` has shape {tuple(self.theta.shape)}; takes {tuple(self.y.shape)}, as y0")
        self.project_y = problem.project_y or (lambda y: y)
        self.scale = torch.ones((), dtype=self.y.dtype, device=self.y.device)
        length = self._check_constraint(normalize_constraints)
        lam = self.y.new_zeros(length) if lam0 is None else checked_point("lam0", lam0).to(self.y)
        if lam.shape != (length,):
            raise ValueError(f"`lam0` has shape {tuple(lam.shape)}; takes ({length},), as `constraint` gives")
        self.lam = self.scale.expand(length) * lam
        self.z = self.lam.clone()
        self.low = -self.r if problem.equality else 0.0
        self._limit = 1e6 * (1 + self._size())

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """The constraint, divided by its gradient's norm at the start where that was asked for."""
        if self.problem.constraint is None:
            return y.new_zeros(0)
        return checked_vector("constraint", self.problem.constraint(x, y)) / self.scale

    def step(self) -> None:
        """One iteration.

        Raises:
            RuntimeError: if the iterates have grown a millionfold.
        """
        problem, x, y, theta, lam = self.problem, self.x, self.y, self.theta, self.lam
        (d_theta,) = _gradients(lambda t: self._lagrangian(x, t, lam), theta)
        moved = self.project_y(theta - self.eta * (d_theta + (theta - y) / self.gamma1))
        with torch.no_grad():
            slope = self.g(x, moved if self.gauss_seidel else theta)
        lam = (lam - self.eta * ((lam - self.z) / self.gamma2 - slope)).clamp(self.low, self.r)
        c = self.c0 * (self.k + 1) ** self.p
        d_x, d_y = _gradients(lambda x, y: problem.upper(x, y) / c + problem.lower(x, y), x, y)
        (d_value,) = _gradients(lambda x: self._lagrangian(x, moved, lam), x)
        x, y = x - self.alpha * (d_x - d_value), y - self.alpha * (d_y - (y - moved) / self.gamma1)
        self.x, self.y = (x, self.project_y(y)) if problem.project_xy is None else problem.project_xy(x, y)
        self.z = (self.z + self.beta * (lam - self.z) / self.gamma2).clamp(self.low, self.r)
        self.theta, self.lam = moved, lam
        self.k += 1
        if not self._size() < self._limit:
            raise RuntimeError(f"diverged at step {self.k - 1}: reduce `eta` or `gamma2`")

    def result(self) -> BilevelResult:
        """What is there now; warns of a multiplier at its bound, and of a theta that left y."""
        with torch.no_grad():
            value = self.g(self.x, self.y) * self.scale
            worst = (value.abs() if self.problem.equality else value).clamp_min(0)
            gap = float(self.problem.lower(self.x, self.y) - self._lagrangian(self.x, self.theta, self.lam))
            violation, upper = float(worst.max()) if len(worst) else 0.0, float(self.problem.upper(self.x, self.y))
        if bool((self.lam.abs() >= self.r).any()):
            warnings.warn(f"a multiplier is at its bound `r` {self.r:g}: take a larger one", UserWarning, stacklevel=2)
        apart = float(torch.linalg.vector_norm(self.y - self.theta))
        if apart > 0.1 * float(torch.linalg.vector_norm(self.y)) + 1e-6:
            message = f"theta lies {apart:.3g} from y: the lower level may not be convex, or take more steps"
            warnings.warn(message, UserWarning, stacklevel=2)
        lam, z = (v / self.scale for v in (self.lam, self.z))
        return BilevelResult(self.x, self.y, self.theta, lam, z, upper, gap, violation, self.k)

    def state_dict(self) -> dict[str, Any]:
        """What a loop of the same problem goes on from."""
        return {name: v.clone() if isinstance(v := getattr(self, name), Tensor) else v for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: for something else, or the state of other shapes.
        """
        if set(state) != set(_STATE) or any(state[n].shape != getattr(self, n).shape for n in _STATE[1:]):
            raise ValueError(f"`state` has {sorted(state)}; takes the state_dict of a loop of this problem")
        for name in _STATE:
            setattr(self, name, state[name].clone() if isinstance(state[name], Tensor) else state[name])

    def _lagrangian(self, x: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
        return self.problem.lower(x, theta) + (lam * self.g(x, theta)).sum()

    def _size(self) -> float:
        return float(sum(torch.linalg.vector_norm(v) for v in (self.x, self.y, self.theta)))

    def _check_constraint(self, normalize: bool) -> int:
        value = self.g(self.x, self.y)
        if not len(value):
            return 0
        rows = []
        for i in range(len(value)):
            d_x, d_y = _gradients(lambda x, y, i=i: self.g(x, y)[i], self.x, self.y)
            if bool((d_x != 0).any()) and self.problem.project_xy is None:
                raise ValueError("`constraint` depends on x and `project_xy` is None; takes the projection of both "
                                 "on {g <= 0}, since one of y alone leaves it")  # fmt: skip
            rows.append(torch.linalg.vector_norm(d_y))
        if normalize:
            self.scale = torch.stack(rows).clamp_min(1e-12)
        return len(value)


def lv_hba(
    problem: BilevelProblem,
    x0: Tensor,
    y0: Tensor,
    *,
    steps: int = 2000,
    callback: Callable[[LVHBA], bool | None] | None = None,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> BilevelResult:
    """Solves a bilevel problem through its proximal Lagrangian value function.

    The lower level is replaced by f(x, y) - v(x, y, z) <= 0 with

        v(x, y, z) = min_theta max_lam f(x, theta) + lam^T g(x, theta) + |theta - y|^2 / (2 gamma1)
                     - |lam - z|^2 / (2 gamma2)

    whose gradient a running (theta, lam) gives. Penalties of it are c_k = c0 (k + 1)^p. Four gradients a step, no
    second derivatives, no inner solver; the lower level need not be strongly convex.

    Source: Yao, Yu, Zeng, Zhang, "Constrained Bi-Level Optimization: Proximal Lagrangian Value function Approach and
    Hessian-free Algorithm" (arXiv 2401.16164), algorithm 1. There theta and lam move at once, which diverges where
    g's gradient is long; here lam follows the new theta.

    Args:
        problem: see `BilevelProblem`.
        x0: upper variable at the start, floating.
        y0: lower variable at the start.
        steps: iterations, >= 1.
        callback: called with the loop after each; a true value ends it.
        state: `state_dict` of a loop of the same problem, to go on from to `steps` in all.
        options: `alpha`, step of (x, y); `beta`, of z; `eta`, of theta and lam; `gamma1` and `gamma2`, proximal
            parameters of theta and lam; `c0` and `p` in (0, 1/2) of the penalty: a larger p is nearer to lower-level
            optimality and farther from stationarity; `r`, the bound of multipliers; `gauss_seidel`, False is the
            paper's order; `normalize_constraints` divides each g_i by its gradient's norm at the start; `theta0`;
            `lam0` (l,), 0 by default.

    Raises:
        ValueError: a number out of range, `lam0` of another length than g, or a g that depends on x without
            `project_xy`.
        RuntimeError: if the iterates grow a millionfold.

    Example:
        >>> problem = BilevelProblem(lambda x, y: (y - 1).square().sum(), lambda x, y: 0.5 * (y - x).square().sum())
        >>> found = lv_hba(problem, torch.zeros(1), torch.zeros(1), alpha=0.1, eta=0.1, gamma1=1.0)
        >>> abs(found.x.item() - 1) < 0.05
        True
    """
    loop = LVHBA(problem, x0, y0, **options)
    checked_count("steps", steps)
    if state is not None:
        loop.load_state_dict(state)
    while loop.k < steps:
        loop.step()
        if callback is not None and callback(loop):
            break
    return loop.result()


def _gradients(f: Callable[..., Tensor], *points: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [point.detach().requires_grad_() for point in points]
        value = f(*leaves)
        if value.numel() != 1:
            raise ValueError(f"`upper`, `lower` or `constraint` gives shape {tuple(value.shape)}; takes a scalar")
        if not value.requires_grad:
            return tuple(torch.zeros_like(point) for point in points)
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g for p, g in zip(points, found, strict=True))
