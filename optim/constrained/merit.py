"""The exact augmented Lagrangian, and derivatives of a problem with equality constraints."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.optim.checks import checked_scalar, checked_vector

__all__ = ["EqualityProblem", "exact_augmented_lagrangian"]


class EqualityProblem:
    """min f(x) subject to c(x) = 0, with derivatives through `torch.func`.

    Args:
        f: a point, shaped as `shape`, to a scalar; twice differentiable, the same for the same point.
        c: a point to (m,), likewise.
        shape: of points; here they are flat (n,).
    """

    def __init__(self, f: Callable[[Tensor], Tensor], c: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self.f = lambda x: _scalar(f(x.view(shape)))
        self.c = lambda x: checked_vector("c", c(x.view(shape)))

    def lagrangian(self, x: Tensor, lam: Tensor) -> Tensor:
        """f + lam^T c."""
        return self.f(x) + (lam * self.c(x)).sum()

    def first(self, x: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        """f, its gradient (n,), c (m,) and its Jacobian (m, n)."""
        gradient, value = torch.func.grad_and_value(self.f)(x)
        residual, pullback = torch.func.vjp(self.c, x)
        rows = [pullback(row)[0] for row in torch.eye(len(residual), dtype=residual.dtype, device=residual.device)]
        return float(value), gradient, residual, torch.stack(rows).to(x) if rows else x.new_zeros(0, len(x))

    def hessian(self, x: Tensor, lam: Tensor) -> Tensor:
        """The Lagrangian's, (n, n)."""
        _forward_mode()
        return torch.func.hessian(self.lagrangian)(x, lam)

    def curvature(self, x: Tensor, lam: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> H v, H the Lagrangian's Hessian, by one forward-mode derivative of its gradient."""
        _forward_mode()
        gradient = torch.func.grad(lambda point: self.lagrangian(point, lam))
        return lambda v: torch.func.jvp(gradient, (x,), (v,))[1]


def exact_augmented_lagrangian(
    f: Callable[[Tensor], Tensor],
    c: Callable[[Tensor], Tensor],
    x: Tensor,
    lam: Tensor,
    eta1: float = 1.0,
    eta2: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """L(x, lam) + eta1 / 2 ||c(x)||^2 + eta2 / 2 ||grad_x L(x, lam)||^2 and its gradients, L = f + lam^T c.

    For finite penalties its minimizers are those of f where c is 0, with their multipliers. The gradients

        grad_x L + eta2 H grad_x L + eta1 G^T c,        c + eta2 G grad_x L

    take the Hessian H of the Lagrangian (the authors' code takes that of f) and the Jacobian G of c.

    Source: Hong, Na, Mahoney, Kolar, "Constrained Optimization via Exact Augmented Lagrangian and Randomized
    Iterative Sketching" (arXiv 2305.18379), equation 5.

    Args:
        f: x to a scalar.
        c: x to (m,).
        x: of any shape, floating.
        lam: (m,).
        eta1: penalty of the violation.
        eta2: of the Lagrangian's gradient.

    Returns:
        The value, and the gradients shaped as x and as lam.

    Example:
        >>> x, lam = torch.tensor([1.0, 0.0]), torch.zeros(1)
        >>> value, _, _ = exact_augmented_lagrangian(lambda x: x[0], lambda x: x.sum().reshape(1), x, lam)
        >>> round(value.item(), 4)      # 1 + 1 / 2 + 0.1 / 2
        1.55
    """
    problem, flat = EqualityProblem(f, c, tuple(x.shape)), x.detach().flatten()
    value, gradient, residual, jacobian = problem.first(flat)
    slope = gradient + jacobian.T @ lam
    bent = problem.curvature(flat, lam)(slope)
    merit = value + lam @ residual + eta1 / 2 * residual.square().sum() + eta2 / 2 * slope.square().sum()
    grad_x = slope + eta2 * bent + eta1 * jacobian.T @ residual
    return merit, grad_x.view(x.shape), residual + eta2 * jacobian @ slope


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        checked_scalar("f", value)
    return value.reshape(())


@functools.cache
def _forward_mode() -> None:
    """Loads PyTorch's forward-mode formulas, which on first use warns of what PyTorch itself calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
