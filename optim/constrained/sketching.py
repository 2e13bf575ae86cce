"""Linear systems by random sketches: project on the solutions of a few random combinations of the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number, checked_point
from trimtab.optim.search.sampling import normal_like

__all__ = ["sketch_project"]

_CHECKED_EVERY = 8


def sketch_project(
    matrix: Tensor | Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    kind: Literal["gaussian", "coordinate"] = "gaussian",
    block: int = 8,
    tol: float = 1e-6,
    x0: Tensor | None = None,
    max_iter: int = 10_000,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float, int]:
    """Solves A x = b by x <- x - A^T S (S^T A A^T S)^+ S^T (A x - b), S random.

    "gaussian" has S (N, block) of standard normal numbers; with `block` 1 it is one random combination of the
    equations. "coordinate" is randomized Kaczmarz: one equation, drawn by its squared norm, or `block` of them at once.
    In expectation the squared error of Kaczmarz falls by 1 - sigma_min(A)^2 / ||A||_F^2 a step.

    Source: Gower, Richtarik (arXiv 1506.03296), as the inner solver of Hong, Na, Mahoney, Kolar (arXiv 2305.18379).

    Args:
        matrix: A (N, n), or v -> A v of a symmetric A.
        b: (N,).
        kind: see above; "coordinate" takes a matrix.
        block: columns of S.
        tol: ends at ||A x - b|| <= tol ||b||, looked at every eight steps, or fewer for a small system.
        x0: (n,), None is 0.
        max_iter: steps.
        generator: of S; None is seed 0.

    Returns:
        x (n,), the norm of its residual, and the steps made.

    Raises:
        ValueError: for a number out of range, b of another shape, or "coordinate" without a matrix.
        TypeError: for something of another type.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> x, residual, steps = sketch_project(A, A @ torch.ones(2, dtype=torch.float64), block=1, tol=1e-9)
        >>> bool((x - 1).abs().max() < 1e-8)
        True
    """
    checked_choice("kind", kind, ("gaussian", "coordinate"))
    checked_number("tol", tol, above=0)
    b, steps = checked_point("b", b), checked_count("max_iter", max_iter)
    generator = checked_generator(generator)
    dense = isinstance(matrix, Tensor)
    if b.ndim != 1 or dense and (matrix.ndim != 2 or len(matrix) != len(b)):
        raise ValueError(f"`b` has shape {tuple(b.shape)}; takes one number for each row of `matrix`")
    if kind == "coordinate" and not dense:
        raise ValueError("`matrix` is a function; 'coordinate' takes a matrix, whose rows it reads")
    block = min(checked_count("block", block), len(b))
    columns = matrix.shape[1] if dense else len(b)
    x = torch.zeros(columns, dtype=b.dtype, device=b.device) if x0 is None else checked_point("x0", x0).to(b).clone()
    if dense:
        return _by_matrix(matrix.to(b), b, x, kind, block, tol, steps, generator)
    return _by_products(matrix, b, x, block, tol, steps, generator)


def _by_matrix(
    A: Tensor, b: Tensor, x: Tensor, kind: str, block: int, tol: float, steps: int, generator: torch.Generator
) -> tuple[Tensor, float, int]:
    """With A A^T at hand a step touches residuals only; x follows at the end from sum S y."""
    gram, r = A @ A.T, A @ x - b
    total, limit, k = torch.zeros_like(b), tol * float(torch.linalg.vector_norm(b)), 0
    diagonal = gram.diagonal().clamp_min(torch.finfo(b.dtype).tiny)
    # A few sketches solve a small system, so that there the residual is looked at more often.
    every = min(max(len(b) // (4 * block), 1), _CHECKED_EVERY)
    while k < steps and float(torch.linalg.vector_norm(r)) > limit:
        count = min(every, steps - k)
        if kind == "coordinate":
            weights = diagonal.to(generator.device, torch.float64)
            drawn = torch.multinomial(weights, count * block, replacement=True, generator=generator).to(b.device)
            for rows in drawn.view(count, block):
                if block == 1:
                    step = r[rows] / diagonal[rows]
                    total.index_add_(0, rows, step)
                    r = r - gram[:, rows[0]] * step
                else:
                    rows = rows.unique()
                    step = _pseudo_solve(gram[rows][:, rows], r[rows])
                    total[rows] += step
                    r = r - gram[:, rows] @ step
        else:
            for S in normal_like(b, generator, (count, len(b), block)):
                moved = gram @ S
                step = _pseudo_solve(S.T @ moved, S.T @ r)
                total += S @ step
                r = r - moved @ step
        k += count
    x = x - A.T @ total
    return x, float(torch.linalg.vector_norm(A @ x - b)), k


def _by_products(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    x: Tensor,
    block: int,
    tol: float,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, float, int]:
    r, limit, k = matvec(x) - b, tol * float(torch.linalg.vector_norm(b)), 0
    while k < steps and float(torch.linalg.vector_norm(r)) > limit:
        S = normal_like(b, generator, (len(b), block))
        W = torch.stack([matvec(column) for column in S.T], 1)
        move = W @ _pseudo_solve(W.T @ W, S.T @ r)
        x, r, k = x - move, r - matvec(move), k + 1
    return x, float(torch.linalg.vector_norm(matvec(x) - b)), k


def _pseudo_solve(gram: Tensor, right: Tensor) -> Tensor:
    """G^+ right of a small symmetric positive semidefinite G."""
    if len(gram) == 1:
        return right / gram[0].clamp_min(torch.finfo(gram.dtype).tiny)
    values, vectors = torch.linalg.eigh(gram)
    cut = values[-1] * len(gram) * torch.finfo(gram.dtype).eps
    inverse = torch.where(values > cut, 1 / values.clamp_min(math.ulp(0.0)), 0.0)
    return vectors @ (inverse * (vectors.T @ right))
