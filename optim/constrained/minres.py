"""MINRES: symmetric systems, indefinite too, from products with their matrix alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number, checked_point

__all__ = ["minres"]


def minres(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: float = 1e-6,
    x0: Tensor | None = None,
    max_iter: int = 1000,
) -> tuple[Tensor, float, int]:
    """The point of the Krylov space with the smallest ||A x - b||, A symmetric.

    Source: Paige, Saunders, "Solution of Sparse Indefinite Systems of Linear Equations" (1975).

    Args:
        matvec: v -> A v.
        b: (n,).
        tol: ends at ||A x - b|| <= tol ||b||.
        x0: where to start; None is 0.
        max_iter: products, but one for `x0`.

    Returns:
        x (n,), the norm of its residual as the recurrence has it, and the products made.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [2.0, -1.0]], dtype=torch.float64)
        >>> x, residual, products = minres(lambda v: A @ v, torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> [round(value, 6) for value in x.tolist()], products
        ([1.0, 1.0], 2)
    """
    checked_number("tol", tol, above=0)
    b = checked_point("b", b)
    x = torch.zeros_like(b) if x0 is None else checked_point("x0", x0).to(b).clone()
    v = b - matvec(x) if x0 is not None else b.clone()
    beta = residual = float(torch.linalg.vector_norm(v))
    limit = tol * float(torch.linalg.vector_norm(b))
    if residual <= limit:
        return x, residual, 0
    v, before = v / beta, torch.zeros_like(v)
    directions = [torch.zeros_like(v), torch.zeros_like(v)]
    cosines, sines, beta = [1.0, 1.0], [0.0, 0.0], 0.0
    for k in range(checked_count("max_iter", max_iter)):
        new = matvec(v) - beta * before
        alpha = float(v @ new)
        new = new - alpha * v
        following = float(torch.linalg.vector_norm(new))
        # The new column of the tridiagonal matrix under the last two rotations, and one of its own.
        epsilon, delta = sines[0] * beta, cosines[0] * beta
        gamma = -sines[1] * delta + cosines[1] * alpha
        delta = cosines[1] * delta + sines[1] * alpha
        length = math.hypot(gamma, following)
        if length <= 1e-14 * (abs(alpha) + beta + following):  # singular, and all of the space used
            return x, residual, k + 1
        cosine, sine = gamma / length, following / length
        direction = (v - epsilon * directions[0] - delta * directions[1]) / length
        x = x + cosine * residual * direction
        residual = residual * sine
        if abs(residual) <= limit or following <= 1e-14 * length:
            return x, abs(residual), k + 1
        directions, cosines, sines = [directions[1], direction], [cosines[1], cosine], [sines[1], sine]
        before, v, beta = v, new / following, following
        residual = -residual
    return x, abs(residual), max_iter
