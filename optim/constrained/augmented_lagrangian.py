"""Equality constraints held exactly: inexact Newton steps judged by the exact augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number, checked_point

from .kkt import KKTSystem, Point
from .merit import EqualityProblem

__all__ = ["AugmentedLagrangianSQP", "ConstrainedResult", "minimize_equality"]

Callback = Callable[[int, dict[str, Any]], bool | None]


@dataclass(frozen=True)
class ConstrainedResult:
    """Where the solver ended.

    Attributes:
        x: the point, shaped as x0.
        multipliers: (m,), of the constraints.
        value: f there.
        kkt: ||(grad f + G^T lambda, c)||.
        violation: the largest |c_i|.
        iterations: steps made.
        status: "converged", "iterations", "callback", or "line_search_failed" with the best point.
        trace: one dict an iteration: `kkt`, `value`, `violation`, `step_size`, `inner` (sketches or products),
            `eta1`, `eta2`, `shift`.
    """

    x: Tensor
    multipliers: Tensor
    value: float
    kkt: float
    violation: float
    iterations: int
    status: str
    trace: tuple[dict[str, Any], ...]


def minimize_equality(
    f: Callable[[Tensor], Tensor],
    c: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    max_iter: int = 200,
    callback: Callback | None = None,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> ConstrainedResult:
    """min f(x) subject to c(x) = 0, by adaptive inexact sequential quadratic programming.

    A step (dx, dlambda) solves the Newton system

        [B  G^T] [dx     ]     [grad f + G^T lambda]
        [G   0 ] [dlambda] = - [c                  ]

    so far that ||r|| <= kappa ||b||, with B the Lagrangian's Hessian, shifted where it is not positive on the
    constraints' tangents. It is taken if it descends on the exact augmented Lagrangian by eta2 / 2 ||b||^2; otherwise
    eta1 grows by nu^2, eta2 and kappa fall by nu. Its length is 1, 1/2, 1/4, ... by Armijo's rule.

    Source: Hong, Na, Mahoney, Kolar (arXiv 2305.18379), algorithm 1. The authors' bound on the inner residual asks for
    about 1e-8; here kappa begins at 0.1 and falls only where descent fails. The smallest shift is taken in place of
    ||H||_F, and an infeasible start first lowers its violation by Gauss-Newton steps.

    Args:
        f: a point to a scalar, twice differentiable, without randomness.
        c: a point to (m,), m at most the number of unknowns; likewise.
        x0: where to start, of any shape. It is taken to float64 if `tol` is below 1e-4.
        max_iter: steps.
        callback: called as (iteration, entry of the trace) after each; a true value ends the run.
        state: of an `AugmentedLagrangianSQP` of the same problem, to go on from.
        options: further arguments of `AugmentedLagrangianSQP`.

    Raises:
        ValueError: m > n, c of another shape, values at x0 that are not finite, dependent constraints there, or more
            than 3000 unknowns and constraints for a solver that needs the matrix.
        TypeError: for something of another type.

    Warns:
        UserWarning: if penalties pass 1e8; the direction is taken then.

    Example:
        >>> a = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> found = minimize_equality(lambda x: a @ x, lambda x: (x @ x - 2).reshape(1), -torch.ones(2),
        ...                           lam0="least_squares")
        >>> [round(v, 4) for v in found.x.tolist()], found.status
        ([-0.8485, -1.1314], 'converged')
    """
    loop = AugmentedLagrangianSQP(f, c, x0, **options)
    if state is not None:
        loop.load_state_dict(state)
    status = "iterations"
    for k in range(checked_count("max_iter", max_iter)):
        if loop.status != "iterations":
            break
        entry = loop.step()
        if callback is not None and callback(k, entry):
            status = "callback"
            break
    return loop.result(status)


class AugmentedLagrangianSQP:
    """The loop of `minimize_equality`, a step at a time.

    Args:
        f: as for `minimize_equality`, like `c` and `x0`.
        lam0: (m,), None is 0, "least_squares" is -(G G^T)^-1 G grad f, which a linear f needs.
        solver: of the Newton system. "dense" factorizes; "sketch" is random Gaussian sketches and "kaczmarz" single
            equations, both of the matrix; "minres" takes products with Hessian and Jacobian only; "auto" is "dense" up
            to 500 unknowns and constraints, "minres" beyond.
        block: columns of a sketch.
        inner_tol: kappa, or "adaptive".
        sharpen: kappa falls with the KKT residual, so that convergence becomes superlinear.
        restore: an infeasible start first lowers its violation by Gauss-Newton steps.
        eta1: penalty of the violation to begin with.
        eta2: of the Lagrangian's gradient.
        beta: of Armijo's rule, in (0, 1/2).
        nu: > 1.
        xi_b: least curvature on the tangents.
        tol: ends at this KKT residual.
        max_inner: sketches or products a step.
        generator: of sketches.

    Attributes:
        status: "iterations" while it goes on, "converged", or "line_search_failed".
        trace: one dict a step made.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        c: Callable[[Tensor], Tensor],
        x0: Tensor,
        *,
        lam0: Tensor | Literal["least_squares"] | None = None,
        solver: Literal["auto", "dense", "minres", "sketch", "kaczmarz"] = "auto",
        block: int = 8,
        inner_tol: float | Literal["adaptive"] = "adaptive",
        sharpen: bool = False,
        restore: bool = True,
        eta1: float = 1.0,
        eta2: float = 0.1,
        beta: float = 0.1,
        nu: float = 1.5,
        xi_b: float = 0.1,
        tol: float = 1e-6,
        max_inner: int = 20_000,
        generator: torch.Generator | None = None,
    ) -> None:
        start = checked_point("x0", x0)
        self.tol = checked_number("tol", tol, above=0)
        x = start.flatten().to(torch.float64 if tol < 1e-4 else torch.promote_types(x0.dtype, torch.float32))
        self.penalties = [checked_number("eta1", eta1, above=0), checked_number("eta2", eta2, above=0)]
        self.nu, self.beta = checked_number("nu", nu, above=1), beta
        if not 0 < checked_number("beta", beta) < 0.5:
            raise ValueError(f"`beta` is {beta}; takes a number in (0, 1/2)")
        self.adaptive, self.sharpen = inner_tol == "adaptive", sharpen
        self.kappa = 0.1 if self.adaptive else checked_number("inner_tol", inner_tol, above=0)
        checked_choice("solver", solver, ("auto", "dense", "minres", "sketch", "kaczmarz"))
        self.shape = x0.shape
        self.problem = EqualityProblem(f, c, tuple(start.shape))
        self.point = Point.at(self.problem, x)
        _check_start(self.point, x)
        if restore:
            self.point = _restored(self.problem, self.point)
        self.lam = _multipliers(lam0, self.point)
        self.system = KKTSystem(self.problem, solver, block, checked_number("xi_b", xi_b, above=0), max_inner,
                                checked_generator(generator))  # fmt: skip
        self.trace: list[dict[str, Any]] = []
        self.best = (self.point.residual(self.lam), self.point, self.lam)
        self.status = "converged" if self.best[0] <= self.tol else "iterations"

    def step(self) -> dict[str, Any]:
        """One step, and its entry of the trace."""
        point, lam = self.point, self.lam
        self.system.at(point, lam)
        accuracy = min(self.kappa, point.residual(lam)) if self.sharpen else self.kappa
        step, accuracy = self.system.direction(self.penalties, accuracy, self.nu, adaptive=self.adaptive)
        self.kappa = min(self.kappa, accuracy) if self.adaptive and not self.sharpen else self.kappa
        size, point, lam = _line_search(self.problem, point, lam, step, self.penalties, self.beta)
        self.point, self.lam = point, lam
        self.system.accepted(size)
        residual = point.residual(lam)
        entry = {"kkt": residual, "value": point.value, "violation": point.violation, "step_size": size,
                 "inner": self.system.inner, "eta1": self.penalties[0], "eta2": self.penalties[1],
                 "shift": self.system.shift}  # fmt: skip
        self.trace.append(entry)
        if residual < self.best[0]:
            self.best = (residual, point, lam)
        if self.best[0] <= self.tol:
            self.status = "converged"
        elif size == 0:
            self.status = "line_search_failed"
        return entry

    def result(self, status: str = "iterations") -> ConstrainedResult:
        """The best point so far; `status` is told where the loop itself has not ended."""
        residual, point, lam = self.best
        status = status if self.status == "iterations" else self.status
        return ConstrainedResult(
            point.x.view(self.shape), lam, point.value, residual, point.violation, len(self.trace), status,
            tuple(self.trace),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a loop of the same problem goes on from, generator included: tensors, numbers and lists."""
        return {
            "x": self.point.x.clone(),
            "lam": self.lam.clone(),
            "best_x": self.best[1].x.clone(),
            "best_lam": self.best[2].clone(),
            "penalties": list(self.penalties),
            "kappa": self.kappa,
            "shift": self.system.shift,
            "trace": [dict(entry) for entry in self.trace],
            "status": self.status,
            "generator": self.system.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: for something else, or the state of another problem's shapes.
        """
        names = set(self.state_dict())
        if set(state) != names or state["x"].shape != self.point.x.shape or state["lam"].shape != self.lam.shape:
            raise ValueError(f"`state` has {sorted(state)}; takes the state_dict of a loop of this problem")
        self.point, self.lam = Point.at(self.problem, state["x"].to(self.point.x)), state["lam"].to(self.lam)
        best_lam = state["best_lam"].to(self.lam)
        best = Point.at(self.problem, state["best_x"].to(self.point.x))
        self.best = (best.residual(best_lam), best, best_lam)
        self.penalties, self.kappa, self.status = list(state["penalties"]), state["kappa"], state["status"]
        self.trace = [dict(entry) for entry in state["trace"]]
        self.system.shift = state["shift"]
        self.system.generator.set_state(state["generator"])


def _check_start(point: Point, x: Tensor) -> None:
    m = len(point.c)
    if m > len(x):
        raise ValueError(f"`c` gives {m} constraints of {len(x)} unknowns; takes at most as many")
    if not point.finite:
        raise ValueError("`f`, `c` or a derivative is not finite at `x0`")
    lowest = float(torch.linalg.eigvalsh(point.jacobian @ point.jacobian.T)[0]) if m else 1.0
    largest = float(point.jacobian.abs().max()) if m else 1.0
    if lowest <= 1e-12 * max(largest, 1e-150) ** 2:
        raise ValueError(
            f"`c` has dependent constraints at `x0`: the least eigenvalue of G G^T is {lowest:.3g}; takes constraints "
            "whose gradients there are independent and not 0"
        )


def _multipliers(lam0: Any, point: Point) -> Tensor:
    if lam0 is None:
        return torch.zeros_like(point.c)
    if isinstance(lam0, str):
        checked_choice("lam0", lam0, ("least_squares",))
        return point.multipliers()
    lam = checked_point("lam0", lam0).to(point.c)
    if lam.shape != point.c.shape:
        raise ValueError(f"`lam0` has shape {tuple(lam.shape)}; takes {tuple(point.c.shape)}, as `c` gives")
    return lam.clone()


def _restored(problem: EqualityProblem, point: Point) -> Point:
    """Gauss-Newton steps on c until it is a hundredth of what it was, or 1e-2."""
    goal = max(0.01 * point.violation, 0.01)
    for _ in range(20):
        if point.violation <= goal:
            break
        move = point.restoration()
        for halvings in range(12):
            trial = Point.at(problem, point.x + 0.5**halvings * move)
            if trial.finite and trial.c.square().sum() <= (1 - 0.2 * 0.5**halvings) * point.c.square().sum():
                break
        else:
            return point
        point = trial
    return point


def _line_search(
    problem: EqualityProblem, point: Point, lam: Tensor, step: tuple[Tensor, Tensor, float], penalties: list[float],
    beta: float,
) -> tuple[float, Point, Tensor]:  # fmt: skip
    """The length accepted, 0 if none is, and what is there."""
    dx, dlam, slope = step
    merit, size = point.merit(lam, penalties), 1.0
    rounding = 1e-14 * max(abs(merit), abs(point.value), 1.0)
    while size >= 1e-12:
        trial, trial_lam = Point.at(problem, point.x + size * dx), lam + size * dlam
        if trial.finite:
            change = trial.merit(trial_lam, penalties) - merit
            if change <= size * beta * slope:
                return size, trial, trial_lam
            # Where the decrease drowns in rounding, the KKT residual decides.
            if abs(change) <= rounding and trial.residual(trial_lam) < point.residual(lam):
                return size, trial, trial_lam
        size /= 2
    return 0.0, point, lam
