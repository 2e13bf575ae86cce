"""Positive semidefinite stand-ins for a Hessian, through torch.func: Fisher's, Gauss-Newton's and log-sum-exp's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fisher_hessian", "gauss_newton_hessian", "logsumexp_hessian"]


def fisher_hessian(per_sample_losses: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """H(x) = sum_i grad f_i grad f_i^T, the empirical Fisher matrix of f = sum_i f_i.

    It is close to the Hessian of logistic and softmax losses where these are near 0 (arXiv:2506.13710, where the
    error is bounded by the optimal value); far from that it can be much slower than no Hessian at all.

    Args:
        per_sample_losses: x (n,) to (m,), the terms of the sum.

    Returns:
        x (n,) to (n, n).

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> fisher_hessian(lambda x: A @ x)(torch.zeros(2)).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """

    def hessian(x: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(per_sample_losses)(x)
        return jacobian.T @ jacobian

    return hessian


def gauss_newton_hessian(residuals: Callable[[Tensor], Tensor], p: float = 2.0) -> Callable[[Tensor], Tensor]:
    """H(x) = ||u||^(p-2) J^T J + (p-2) ||u||^(p-4) (J^T u)(J^T u)^T of f = ||u(x)||^p / p with u's Jacobian J.

    Source: arXiv:2506.13710, the Gauss-Newton approximation for nonlinear equations.

    Args:
        residuals: x (n,) to u (m,).
        p: >= 2.

    Returns:
        x (n,) to (n, n).

    Raises:
        ValueError: `p` is below 2.

    Example:
        >>> A = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> gauss_newton_hessian(lambda x: A @ x)(torch.ones(2)).tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """
    if not p >= 2:
        raise ValueError(f"`p` is {p}; takes a number >= 2")

    def hessian(x: Tensor) -> Tensor:
        u, jacobian = residuals(x), torch.func.jacrev(residuals)(x)
        if p == 2:
            return jacobian.T @ jacobian
        size, g = u.norm().clamp_min(torch.finfo(u.dtype).tiny), jacobian.T @ u
        return size ** (p - 2) * jacobian.T @ jacobian + (p - 2) * size ** (p - 4) * torch.outer(g, g)

    return hessian


def logsumexp_hessian(A: Tensor, b: Tensor, mu: float) -> Callable[[Tensor], Tensor]:
    """H(x) = A^T Diag(pi) A / mu of f = mu log sum_i exp((<a_i, x> - b_i) / mu), the term -g g^T / mu left out.

    Source: arXiv:2506.13710.

    Args:
        A: (m, n).
        b: (m,).
        mu: > 0.

    Returns:
        x (n,) to (n, n).

    Raises:
        ValueError: shapes that do not fit, or `mu` not positive.
    """
    if A.ndim != 2 or b.shape != A.shape[:1]:
        raise ValueError(f"`A` has shape {tuple(A.shape)}, `b` {tuple(b.shape)}; takes (m, n) and (m,)")
    if not mu > 0:
        raise ValueError(f"`mu` is {mu}; takes a number > 0")

    def hessian(x: Tensor) -> Tensor:
        matrix = A.to(x)
        pi = torch.softmax((matrix @ x - b.to(x)) / mu, 0)
        return (matrix.T * pi) @ matrix / mu

    return hessian
