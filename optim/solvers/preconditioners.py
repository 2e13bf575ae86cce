"""Baselines for `conjugate_directions` on sparse matrices: incomplete Cholesky, and vectors to deflate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["block_deflation", "incomplete_cholesky", "sparse_matvec"]


def sparse_matvec(A: Any) -> Callable[[Tensor], Tensor]:
    """A `scipy.sparse` matrix as the `matvec` of `conjugate_directions`, computed on the host.

    Args:
        A: (n, n).

    Returns:
        (n,) to (n,), of the argument's dtype and device.
    """
    A = A.tocsr()
    return lambda x: torch.from_numpy(A @ x.double().cpu().numpy()).to(x)


def incomplete_cholesky(A: Any) -> Callable[[Tensor], Tensor]:
    """r to (L L^T)^{-1} r with the incomplete Cholesky factor L of A's own pattern, IC(0).

    l_ij = (a_ij - sum_{k < j} l_ik l_jk) / l_jj where a_ij is not 0, and no entry elsewhere; one of the baselines of
    arXiv:2205.10763. The factor is computed on the host, row by row, in time linear in the entries.

    Args:
        A: `scipy.sparse`, (n, n), symmetric positive definite. It exists for M-matrices such as Laplacians.

    Returns:
        The `propose` of `conjugate_directions`: (n,) to (n,).

    Raises:
        ValueError: A is not square, or a pivot is not positive.

    Example:
        >>> from scipy.sparse import csr_array
        >>> solve = incomplete_cholesky(csr_array([[4.0, 2.0], [2.0, 5.0]]))  # complete, as nothing is left out
        >>> [round(value, 6) for value in solve(torch.tensor([8.0, 12.0], dtype=torch.float64)).tolist()]
        [1.0, 2.0]
    """
    from scipy.sparse import csr_array, tril
    from scipy.sparse.linalg import splu

    if A.shape[0] != A.shape[1]:
        raise ValueError(f"`A` has shape {A.shape}; takes a square matrix")
    lower = csr_array(tril(A.tocsr()))
    lower.sort_indices()
    pointers, columns, values = lower.indptr.tolist(), lower.indices.tolist(), lower.data.tolist()
    rows: list[dict[int, float]] = []
    diagonal: list[float] = []
    for i in range(A.shape[0]):
        row: dict[int, float] = {}
        pivot = 0.0
        for place in range(pointers[i], pointers[i + 1]):
            j, value = columns[place], values[place]
            if j == i:
                pivot += value
                continue
            other = rows[j]
            for k in row.keys() & other.keys():
                value -= row[k] * other[k]
            row[j] = value / diagonal[j]
            pivot -= row[j] ** 2
        if not pivot > 0:
            raise ValueError(f"`A` has no incomplete Cholesky factor: the pivot of row {i} is {pivot:g}")
        rows.append(row)
        diagonal.append(pivot**0.5)
        values[pointers[i] : pointers[i + 1]] = [*row.values(), diagonal[i]]
    factor = csr_array((np.array(values), lower.indices, lower.indptr), shape=A.shape)
    # An LU factorization in the natural order of a triangular matrix is that matrix: fast triangular solves.
    solver = splu(factor.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": False})

    def solve(r: Tensor) -> Tensor:
        right = solver.solve(r.double().cpu().numpy())
        return torch.from_numpy(solver.solve(right, trans="T")).to(r)

    return solve


def block_deflation(mask: Tensor, blocks: int = 4) -> Tensor:
    """Indicators of the mask's parts in blocks x blocks rectangles: vectors to deflate Poisson's equation by.

    Args:
        mask: (H, W) bool.
        blocks: a side; 4 gives the 16 vectors of arXiv:2205.10763's baseline.

    Returns:
        (m, H, W) float64, only rectangles with a pixel of the mask.

    Raises:
        ValueError: `blocks` below 1, or a mask without a pixel.
    """
    if blocks < 1 or mask.ndim != 2 or not bool(mask.any()):
        raise ValueError(f"`blocks` is {blocks}, `mask` {tuple(mask.shape)}; takes >= 1 and (H, W) with a pixel")
    rows, columns = (torch.arange(side, device=mask.device) * blocks // side for side in mask.shape)
    part = rows[:, None] * blocks + columns[None]
    vectors = torch.stack([((part == index) & mask.bool()).double() for index in range(blocks**2)])
    return vectors[vectors.flatten(1).any(1)]
