"""Directional attacks: steps that push a network's output along a direction, safeguarded by direct search."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_number, checked_scalar, checked_vector

from .direct_search import DirectSearch
from .polling import DirectSearchResult

__all__ = ["directional_attack", "maximize_with_attacks"]


def directional_attack(
    phi: Callable[[Tensor], Tensor],
    x: Tensor,
    u: Tensor,
    radius: float,
    *,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 1,
    step_size: float | None = None,
) -> Tensor:
    """A step d, ||d|| <= radius, along which <u, phi(x + d)> rises.

    With J the Jacobian of phi, one step is radius sign(J^T u) (FGSM), or radius J^T u / ||J^T u|| for "l2". Several
    are projected gradient ascent (PGD) from d = 0. The direction enters as it is: u^T phi, all of it.

    Source: Bouchet, Vidal, "Optimization by Directional Attacks" (arXiv 2510.01461), equation of the attack operator.
    Their code hands u to a cross-entropy as if it were a label, which loses its component along (1, ..., 1).

    Args:
        phi: x to a tensor shaped as `u`, differentiable.
        x: of any shape.
        u: the direction in the output.
        radius: > 0.
        norm: of the ball.
        steps: >= 1.
        step_size: of several steps; None is a quarter of the radius.

    Returns:
        d, shaped as x; 0 where J^T u is.

    Raises:
        ValueError: a number out of range, u of another shape, or phi has no gradient.

    Example:
        >>> W = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
        >>> directional_attack(lambda x: W @ x, torch.zeros(2), torch.tensor([1.0, 1.0]), 0.1)
        tensor([ 0.1000, -0.1000])
    """
    checked_number("radius", radius, above=0)
    checked_choice("norm", norm, ("linf", "l2"))
    size = radius if checked_count("steps", steps) == 1 else radius / 4 if step_size is None else step_size
    checked_number("step_size", size, above=0)
    d = torch.zeros_like(x)
    for _ in range(steps):
        d = _clipped(d + size * _unit(pullback(phi, x + d, u), norm), radius, norm)
    return d


def pullback(phi: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    """J^T u at x."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        y = phi(point)
        if y.shape != u.shape:
            raise ValueError(f"`u` has shape {tuple(u.shape)}; takes that of phi(x), {tuple(y.shape)}")
        if not y.requires_grad:
            raise ValueError("`phi` has no gradient with respect to x: an attack needs one")
        (gradient,) = torch.autograd.grad(y, point, u.detach().to(y.dtype), allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _unit(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    return gradient / torch.linalg.vector_norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def _clipped(d: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "linf":
        return d.clamp(-radius, radius)
    return d * (radius / torch.linalg.vector_norm(d).clamp_min(radius))


def maximize_with_attacks(
    phi: Callable[[Tensor], Tensor],
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    constraints: Callable[[Tensor, Tensor], Tensor] | None = None,
    barrier: Literal["extreme", "two-phase", "quadratic"] = "extreme",
    penalty: float = 1.0,
    attack: Literal["fgsm", "pgd"] = "fgsm",
    norm: Literal["linf", "l2"] = "linf",
    max_evals: int = 2000,
    callback: Callable[[DirectSearch], bool | None] | None = None,
    **options: Any,
) -> DirectSearchResult:
    """Maximizes f(phi(x)) under constraints(x, phi(x)) <= 0 by attacks along grad f, safeguarded by direct search.

    Attacks climb f under the extreme barrier, f less the penalty under the quadratic one, and lower the violation of
    an infeasible incumbent under the two-phase one, so far as the constraints have a gradient. Where phi has none
    there are no attacks, with a warning. A point is evaluated once; its gradient is computed once.

    Source: Bouchet, Vidal, arXiv 2510.01461, the hybrid method; their poll set spans half of the space for n + 1
    directions, ours all of it.

    Args:
        phi: x to a tensor of any shape, the same for the same x: no dropout, samplers with a fixed seed.
        f: phi's output to a scalar, differentiable.
        x0: where to start, of any shape.
        constraints: x and phi's output to (p,), feasible where all are <= 0.
        barrier: see `DirectSearch`.
        penalty: see `DirectSearch`.
        attack: "fgsm" is one step, "pgd" ten.
        norm: of the attack's ball.
        max_evals: evaluations of phi, less those for gradients.
        callback: called with the search after each evaluation; a true value ends the run.
        options: of `DirectSearch`: `retract`, `r0`, `r_atk`, `r_dsm`, `sufficient`, `dsm_after`, `direct`, ....

    Raises:
        ValueError: a number out of range, f that gives no scalar, constraints of another shape, or an infeasible start
            under the extreme barrier.

    Example:
        >>> found = maximize_with_attacks(lambda x: x**3, lambda y: -(y - 8).square().sum(), torch.ones(3))
        >>> (found.x - 2).abs().max().item() < 1e-3
        True
    """
    checked_choice("attack", attack, ("fgsm", "pgd"))
    checked_count("max_evals", max_evals)
    attacker = _Attacker(phi, f, constraints, barrier, penalty, norm, 1 if attack == "fgsm" else 10)
    if not attacker.possible(x0):
        warnings.warn("`phi` has no gradient: direct search alone", UserWarning, stacklevel=2)
    hook = attacker if attacker.differentiable else None
    search = DirectSearch(x0, barrier=barrier, penalty=penalty, attack=hook, **options)
    attacker.search = search
    reason = "evaluations"
    while search.evaluations < max_evals:
        x = search.ask()
        if search.finished:
            reason = "radius"
            break
        with torch.no_grad():
            y = phi(x)
            value = checked_scalar("f", f(y))
            search.tell(value, None if constraints is None else checked_vector("constraints", constraints(x, y)))
        if callback is not None and callback(search):
            reason = "callback"
            break
    return search.result(attacker.gradients, reason)


class _Attacker:
    """(x, radius) -> d, with the gradient at x kept for further radii."""

    def __init__(self, phi: Any, f: Any, constraints: Any, barrier: str, penalty: float, norm: str, steps: int) -> None:
        self.phi, self.f, self.constraints = phi, f, constraints
        self.barrier, self.penalty, self.norm, self.steps = barrier, penalty, norm, steps
        self.gradients = 0
        self.differentiable = True
        self.search: DirectSearch | None = None
        self._at: tuple[Tensor, Tensor] | None = None

    def possible(self, x: Tensor) -> bool:
        with torch.enable_grad():
            self.differentiable = self.phi(x.detach().requires_grad_()).requires_grad
        return self.differentiable

    def augmented(self, x: Tensor) -> Tensor:
        """phi(x), and with constraints the violations after it."""
        y = self.phi(x)
        if self.constraints is None or self.barrier == "extreme":
            return y
        return torch.cat([y.flatten(), self.constraints(x, y).clamp_min(0).flatten().to(y.dtype)])

    def direction(self, x: Tensor) -> Tensor:
        """The gradient of what is climbed, with respect to `augmented`."""
        with torch.no_grad():
            shape = self.phi(x).shape
        with torch.enable_grad():
            out = self.augmented(x.detach()).detach().requires_grad_()
            y, z = (out, None) if out.shape == shape else (out[: shape.numel()].view(shape), out[shape.numel() :])
            if z is None:
                climbed = self.f(y)
            elif self.barrier == "quadratic":
                climbed = self.f(y) - self.penalty * z.square().sum()
            else:
                climbed = -z.sum() if self.search.score[0] < 0 else self.f(y)
            (u,) = torch.autograd.grad(climbed.sum(), out)
        return u

    def __call__(self, x: Tensor, radius: float) -> Tensor:
        if self.steps > 1:
            self.gradients += self.steps
            return directional_attack(self.augmented, x, self.direction(x), radius, norm=self.norm, steps=self.steps)
        if self._at is None or self._at[0] is not x:
            self.gradients += 1
            self._at = (x, pullback(self.augmented, x, self.direction(x)))
        return _clipped(radius * _unit(self._at[1], self.norm), radius, self.norm)
