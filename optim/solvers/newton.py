"""Newton's method with gradient-normalized smoothness: one number, found by doubling and halving, makes it global."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .conjugate_directions import conjugate_directions

__all__ = ["NewtonResult", "NewtonStep", "gradient_normalized_newton"]

DENSE_LIMIT = 2000
"""Variables up to which the matrix of the exact Hessian is formed and the arithmetic is float64."""


@dataclass(frozen=True)
class NewtonStep:
    """An accepted step.

    Attributes:
        fun: the value before it.
        grad_norm: the gradient's norm before it.
        gamma: the radius that was accepted.
        step_norm: its length, at most `gamma`.
        decrease: f(x) - f(x_new).
        required: what the acceptance test asked of the decrease.
        num_solves: linear systems solved for it.
    """

    fun: float
    grad_norm: float
    gamma: float
    step_norm: float
    decrease: float
    required: float
    num_solves: int


@dataclass(frozen=True)
class NewtonResult:
    """Where the iteration ended.

    Attributes:
        x: of the start's shape and dtype, the best point.
        fun: f(x).
        grad_norm: norm of the gradient there.
        gamma: the radius for a next step.
        num_iterations: accepted steps.
        num_solves: linear systems solved.
        num_function_evaluations: evaluations of the value and the gradient.
        status: "converged", "max_iterations", or "stalled", where no step of the search was accepted.
        history: the accepted steps.
    """

    x: Tensor
    fun: float
    grad_norm: float
    gamma: float
    num_iterations: int
    num_solves: int
    num_function_evaluations: int
    status: Literal["converged", "max_iterations", "stalled"]
    history: list[NewtonStep]


def gradient_normalized_newton(
    fun: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    hessian: Literal["exact", "zero", "diagonal"] | Callable[[Tensor], Any] = "exact",
    gamma0: float = 1.0,
    max_iterations: int = 200,
    grad_tolerance: float = 1e-6,
    max_search: int = 40,
    solver: Literal["cholesky", "cg"] = "cholesky",
    cg_tolerance: float = 1e-3,
    callback: Callable[[Tensor, NewtonStep], bool | None] | None = None,
) -> NewtonResult:
    """Minimizes f by x_{k+1} = x_k - (H_k + (||g_k|| / gamma_k) I)^{-1} g_k with a searched radius gamma_k.

    The step is accepted where f(x_k) - f(x_{k+1}) >= gamma ||g_{k+1}||^2 / (8 ||g_k||), and gamma is then doubled;
    else it is halved. No constant of the problem is asked for: near a regular minimum with exact Hessians gamma grows
    and the method is Newton's; with H = 0 it is normalized gradient descent.

    Source: "Gradient-Normalized Smoothness for Optimization with Approximate Hessians" (arXiv:2506.13710), the
    universal method with its adaptive search. Other than the authors' code, a Hessian that is not positive definite
    with its shift counts as a rejected trial, an exhausted search stops ("stalled") and never takes a worse point,
    and a decrease below the rounding of f is accepted where the gradient does not grow.

    It compares values at one and the same f, so f must be deterministic. Of the approximations in
    `hessian_approximations`, Gauss-Newton's is close to exact; Fisher's can be far slower than "zero" away from the
    optimum. For large smooth problems L-BFGS is often the better choice.

    Args:
        fun: x, of the start's shape and, up to 2000 variables, float64, to a 0-d tensor; differentiable twice for
            "exact" and "diagonal".
        x0: floating, any shape, not empty.
        hessian: "exact" (positive semidefinite or not), "zero", "diagonal" of the exact one, negative entries set to
            0, or a function of flat x (n,) that gives (n, n), its diagonal (n,), or, with `solver="cg"`, a function
            v (n,) to H v (n,).
        gamma0: > 0, the first radius.
        max_iterations: accepted steps at most, >= 0.
        grad_tolerance: >= 0; the run ends where the gradient's norm is at most this.
        max_search: trials of one step, >= 1.
        solver: "cholesky", or "cg", which forms no matrix where H is given by products ("exact" is too).
        cg_tolerance: of "cg": its residual is at most this times the gradient's norm.
        callback: called as (x, step) after each accepted step; True ends the run ("max_iterations").

    Returns:
        The result.

    Raises:
        ValueError: an argument out of range, a value that is not 0-d or differs between two calls, or a Hessian of
            another shape or not finite.
        TypeError: `x0` is not floating.
        RuntimeError: f(x0) or its gradient is not finite.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> result = gradient_normalized_newton(lambda x: (x @ A @ x) / 2 - x.sum(), torch.zeros(2).double())
        >>> [round(value, 4) for value in (A @ result.x).tolist()], result.status
        ([1.0, 1.0], 'converged')
    """
    _check(x0, hessian, gamma0, max_iterations, grad_tolerance, max_search, solver, cg_tolerance)
    wide = x0.numel() <= DENSE_LIMIT and x0.device.type != "mps"
    dtype = torch.float64 if wide else torch.promote_types(x0.dtype, torch.float32)
    problem = _Problem(fun, x0, dtype, hessian, solver, cg_tolerance)
    x = x0.detach().to(dtype).flatten()
    f, g = problem.value_and_gradient(x)
    again, _ = problem.value_and_gradient(x)
    if not (math.isfinite(f) and bool(torch.isfinite(g).all())):
        raise RuntimeError(f"`fun` or its gradient is not finite at `x0` (value {f}): there is nothing to start from")
    if f != again:
        raise ValueError(f"`fun` gives {f} and then {again} at `x0`; takes a deterministic function")
    norm, gamma, history, status = float(g.norm()), gamma0, [], "max_iterations"
    for _ in range(max_iterations):
        if norm <= grad_tolerance:
            break
        trial = _search(problem, x, f, g, norm, gamma, max_search)
        if trial is None:
            status = "stalled"
            break
        x, f, g, step = trial
        norm = float(g.norm())
        gamma = min(max(2 * step.gamma, 1e-9), 1e12 * max(1.0, float(x.norm())))
        history.append(step)
        if callback is not None and callback(x.reshape(x0.shape).to(x0.dtype), step):
            break
    if norm <= grad_tolerance:
        status = "converged"
    point = x.reshape(x0.shape).to(x0.dtype)
    return NewtonResult(point, f, norm, gamma, len(history), problem.solves, problem.evaluations, status, history)


def _search(
    problem: _Problem, x: Tensor, f: float, g: Tensor, norm: float, gamma: float, tries: int
) -> tuple[Tensor, float, Tensor, NewtonStep] | None:
    """The first trial that passes the test, from `gamma` downwards."""
    H, before = problem.hessian_at(x), problem.solves
    for _ in range(tries):
        shift = norm / gamma
        step = problem.solve(H, shift, g)
        if step is not None:
            new = x - step
            f_new, g_new = problem.value_and_gradient(new)
            required = float(g_new.square().sum()) / (8 * shift)
            decrease = f - f_new
            # Below the rounding of f its difference says nothing; the gradient still does.
            rounded = required < 8 * torch.finfo(x.dtype).eps * max(1.0, abs(f)) and float(g_new.norm()) <= norm
            if math.isfinite(required) and math.isfinite(f_new) and (decrease >= required or rounded):
                length = float(step.norm())
                record = NewtonStep(f, norm, gamma, length, decrease, required, problem.solves - before)
                return new, f_new, g_new, record
        gamma /= 2
    return None


class _Problem:
    """f on flat vectors, with its gradient, its Hessian and their counts."""

    def __init__(self, fun: Any, x0: Tensor, dtype: torch.dtype, hessian: Any, solver: str, tolerance: float) -> None:
        self._fun, self._shape, self._dtype = fun, x0.shape, dtype
        self._hessian, self._solver, self._tolerance = hessian, solver, tolerance
        self.evaluations = self.solves = 0

    def _value(self, x: Tensor) -> Tensor:
        value = self._fun(x.reshape(self._shape))
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"`fun` gives {got}; takes a function to a 0-d tensor")
        return value

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        self.evaluations += 1
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = self._value(point)
            (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient.detach()

    def hessian_at(self, x: Tensor) -> Any:
        """(n, n), (n,), a function of vectors, or None for zero."""
        n = x.numel()
        if self._hessian == "zero":
            return None
        gradient = torch.func.grad(self._value)
        if self._hessian == "diagonal":
            rows = torch.eye(n, dtype=x.dtype, device=x.device)
            product = torch.func.vjp(gradient, x)[1]
            products = torch.func.vmap(lambda v: (product(v)[0] * v).sum(), chunk_size=256)
            return products(rows).clamp_min(0).detach()
        if self._hessian == "exact":
            if self._solver == "cg":
                product = torch.func.vjp(gradient, x)[1]  # the Hessian is its own transpose
                return lambda v: product(v)[0].detach()
            H: Any = torch.func.jacrev(gradient)(x).detach()
        else:
            H = self._hessian(x.detach())
        if callable(H) and not isinstance(H, Tensor):
            if self._solver != "cg":
                raise ValueError("`hessian` gives a function of vectors, which takes solver='cg'")
            return H
        H = torch.as_tensor(H, dtype=x.dtype, device=x.device)
        if H.shape not in ((n, n), (n,)):
            raise ValueError(f"`hessian` gives shape {tuple(H.shape)} for {n} variables; takes ({n}, {n}) or ({n},)")
        if not bool(torch.isfinite(H).all()):
            raise ValueError("`hessian` gives a matrix with entries that are not finite")
        return H

    def solve(self, H: Any, shift: float, g: Tensor) -> Tensor | None:
        """(H + shift I)^{-1} g, or None where that matrix is not positive definite."""
        if H is None:
            return g / shift
        self.solves += 1
        if isinstance(H, Tensor) and H.ndim == 1:
            return g / (H + shift)
        if self._solver == "cg":
            product = (lambda v: H @ v) if isinstance(H, Tensor) else H
            try:
                found = conjugate_directions(
                    lambda v: product(v) + shift * v, g, tolerance=self._tolerance, max_iterations=10 * g.numel()
                )
            except ValueError:
                return None
            return found.x if found.converged else None
        factor, info = torch.linalg.cholesky_ex(H + shift * torch.eye(len(H), dtype=H.dtype, device=H.device))
        return None if int(info) else torch.cholesky_solve(g[:, None], factor)[:, 0]


def _check(
    x0: Tensor, hessian: Any, gamma0: float, iterations: int, tolerance: float, tries: int, solver: str, cg: float
) -> None:
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        raise TypeError(f"`x0` is {x0.dtype if isinstance(x0, Tensor) else type(x0).__name__}; takes a floating tensor")
    if not x0.numel():
        raise ValueError("`x0` is empty; takes at least one variable")
    if not callable(hessian) and hessian not in ("exact", "zero", "diagonal"):
        raise ValueError(f"`hessian` is {hessian!r}; takes 'exact', 'zero', 'diagonal' or a function")
    if hessian == "exact" and solver == "cholesky" and x0.numel() > DENSE_LIMIT:
        raise ValueError(f"`x0` has {x0.numel()} variables; 'exact' takes solver='cg' above {DENSE_LIMIT}")
    if not (gamma0 > 0 and math.isfinite(gamma0)):
        raise ValueError(f"`gamma0` is {gamma0}; takes a finite number > 0")
    if iterations < 0 or tries < 1:
        raise ValueError(f"`max_iterations` is {iterations}, `max_search` {tries}; takes >= 0 and >= 1")
    if not tolerance >= 0 or not cg > 0:
        raise ValueError(f"`grad_tolerance` is {tolerance}, `cg_tolerance` {cg}; takes >= 0 and > 0")
    if solver not in ("cholesky", "cg"):
        raise ValueError(f"`solver` is {solver!r}; takes 'cholesky' or 'cg'")
