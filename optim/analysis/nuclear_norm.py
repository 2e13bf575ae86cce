"""The smallest nuclear norm under linear constraints of rank one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nuclear_norm_program"]


def nuclear_norm_program(D: Tensor, Z: Tensor, start: Tensor, *, max_iter: int = 4000, tol: float = 1e-9) -> Tensor:
    """min ||W||_* such that D_c^T W Z_c >= 1, by the alternating direction method of multipliers.

    W = V is split from the constraints' slack r = A W >= 1: the step in W solves (I + A^T A) through the m x m matrix
    I + G with the constraints' Gram matrix G, the step in V shrinks singular values by 1 / rho.

    Args:
        D: (m, d) float64.
        Z: (m, e) float64.
        start: (d, e), feasible.
        max_iter: at most.
        tol: relative, on both residuals.

    Returns:
        (d, e), divided by its least D_c^T W Z_c: feasible, so that its norm is an upper bound of the least.
    """
    size = float(torch.linalg.matrix_norm(start, 2))
    gram = (D @ D.T) * (Z @ Z.T)
    length = gram.diagonal().mean().sqrt()  # constraints of length about 1: A / length
    D = D / length
    gram = gram / length.square()
    factor = torch.linalg.cholesky(torch.eye(len(D), dtype=D.dtype) + gram)

    def forward(W: Tensor) -> Tensor:
        return ((D @ W) * Z).sum(1)

    def adjoint(y: Tensor) -> Tensor:
        return (D * y[:, None]).T @ Z

    scale = 1 / size  # the solution has singular values of about 1
    bound = torch.full((len(D),), float(scale / length), dtype=D.dtype)
    V, r = start * scale, torch.maximum(bound, forward(start * scale))
    P, q, rho = torch.zeros_like(V), torch.zeros_like(r), 1.0
    for step in range(max_iter):
        right = V - P + adjoint(r - q)
        W = right - adjoint(torch.cholesky_solve(forward(right)[:, None], factor)[:, 0])
        before_V, before_r = V, r
        U, values, Vh = torch.linalg.svd(W + P, full_matrices=False)
        V = (U * (values - 1 / rho).clamp_min(0)) @ Vh
        AW = forward(W)
        r = torch.maximum(bound, AW + q)
        P, q = P + W - V, q + AW - r
        primal = (W - V).square().sum().add((AW - r).square().sum()).sqrt()
        dual = rho * (V - before_V).square().sum().add((r - before_r).square().sum()).sqrt()
        if float(primal) < tol * float(V.norm() + 1e-30) and float(dual) < tol * rho * float(P.norm() + 1e-30):
            break
        if step % 20 == 19 and step < max_iter // 2:
            change = 2.0 if primal > 10 * dual else 0.5 if dual > 10 * primal else 1.0
            rho, P, q = rho * change, P / change, q / change
    least = float((forward(V) * length).min())
    if least <= 0:
        V, least = start, float((forward(start) * length).min())
    return V / least
