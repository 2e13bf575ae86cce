"""The discrete cosine transform as a basis that needs no storage, and the choice of its columns for a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count

__all__ = ["BASES", "ColumnSelection", "basis_columns", "dct2_rows", "dct_matrix", "project_back", "select_columns"]

BASES = ("dct", "random", "identity")
FAST_FROM = 1024
"""Width from which the fast transform beats the product with the matrix (measured on one core)."""


@lru_cache(maxsize=64)
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos(pi k / (2 n)), k = 0 ... 4 n - 1: all that a row of the transform holds, up to its scale."""
    values = torch.cos(torch.arange(4 * n, dtype=torch.float64) * (torch.pi / (2 * n)))
    return (values * (2 / n) ** 0.5).to(device, dtype)


def _dct_rows(indices: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Rows `indices` of the matrix, made without it: (r, n)."""
    rows = indices.long()[:, None]
    angles = rows * (2 * torch.arange(n, device=indices.device) + 1) % (4 * n)
    values = _cosines(n, dtype, indices.device)[angles]
    return torch.where(rows == 0, values * 0.5**0.5, values)


@lru_cache(maxsize=32)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _dct_rows(torch.arange(n, device=device), n, dtype)


def dct_matrix(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The orthogonal matrix (n, n) whose rows are the DCT-II's basis: x @ dct_matrix(n).T transforms rows.

    Q_ij = sqrt(2 / n) c_i cos(pi i (2 j + 1) / (2 n)), c_0 = 1 / sqrt 2, otherwise 1. Kept for the next call with the
    same arguments: do not change it in place.

    Raises:
        TypeError: if n is no integer.
        ValueError: if n < 1.

    Example:
        >>> dct_matrix(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """
    return _matrix(checked_count("n", n), dtype, torch.device(device or "cpu"))


@lru_cache(maxsize=32)
def _fast_parts(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The order of Makhoul's algorithm, and its factors in the complex dtype that `dtype` needs."""
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    factors = torch.polar(torch.full_like(k, (2 / n) ** 0.5), -torch.pi * k / (2 * n))
    factors[0] *= 0.5**0.5
    return order.to(device), factors.to(device, dtype.to_complex())


def dct2_rows(x: Tensor, *, method: Literal["auto", "fft", "matmul"] = "auto") -> Tensor:
    """The orthonormal DCT-II over the last axis, as scipy.fft.dct(x, norm="ortho").

    Source: Makhoul, "A Fast Cosine Transform in One and Two Dimensions" (1980), the N-point algorithm; its use here:
    Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    arXiv 2505.17967.

    Args:
        x: (..., n), floating; worked on, and returned, in float32 at least.
        method: "fft" is O(n log n) a row, "matmul" O(n^2); "auto" takes the first from n = 1024 on.

    Raises:
        ValueError: for another method, or an x without elements.

    Example:
        >>> dct2_rows(torch.ones(1, 4)).round(decimals=4).abs()
        tensor([[2., 0., 0., 0.]])
    """
    checked_choice("method", method, ("auto", "fft", "matmul"))
    if not x.ndim or not x.numel():
        raise ValueError(f"`x` has shape {tuple(x.shape)}; takes (..., n) with elements")
    x, n = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1]
    if method == "matmul" or (method == "auto" and n < FAST_FROM):
        return x @ _matrix(n, x.dtype, x.device).T
    order, factors = _fast_parts(n, x.dtype, x.device)
    half = torch.fft.rfft(x[..., order]) * factors
    # Entry n - k is minus the imaginary part of entry k: a real input needs half the transform.
    return torch.cat([half.real, -half.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)


@lru_cache(maxsize=16)
def _random_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    gaussian = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].to(device, dtype)


@dataclass(frozen=True)
class ColumnSelection:
    """Which columns of a basis a matrix is projected on.

    Attributes:
        indices: (r,), int32, ascending.
        side: "right" for coordinates G B[:, indices], "left" for B[:, indices]^T G.
    """

    indices: Tensor
    side: str


def basis_columns(indices: Tensor, n: int, basis: str, dtype: torch.dtype) -> Tensor:
    """The columns themselves, as rows: (r, n)."""
    if basis == "identity":
        return torch.nn.functional.one_hot(indices.long(), n).to(dtype)
    if basis == "random":
        return _random_basis(n, dtype, indices.device).T[indices.long()]
    if n < FAST_FROM:
        return _matrix(n, dtype, indices.device)[indices.long()]
    return _dct_rows(indices, n, dtype)


def _coordinates(rows: Tensor, basis: str) -> Tensor:
    """Coordinates of rows (R, n) in the whole basis."""
    if basis == "dct":
        return dct2_rows(rows)
    return rows if basis == "identity" else rows @ _random_basis(rows.shape[-1], rows.dtype, rows.device)


def select_columns(
    G: Tensor, rank: int, *, basis: str = "dct", p: int = 2, side: str | None = None
) -> tuple[Tensor, ColumnSelection]:
    """The `rank` columns of an orthogonal basis that a matrix aligns with most, and its coordinates in them.

    With p = 2 the choice is the best of all subsets of that size, and the squared error of projecting is at most
    (1 - rank / n) ||G||^2. Source: Modoranu et al., arXiv 2505.17967, the two-step procedure and its contraction.

    Args:
        G: (R, C), finite.
        rank: columns to take, at most the projected axis' length.
        basis: "dct", "random" (one orthogonal matrix for each width) or "identity".
        p: norm, 1 or 2, that ranks them: 1 is the authors' code's, 2 the bound's.
        side: "right" projects the rows, "left" the columns; None the shorter axis, the rows' in a square matrix.

    Returns:
        Coordinates, (R, rank) or (rank, C) for "left", in float32 at least; and the selection.

    Raises:
        ValueError: for a shape, rank, basis, norm or side out of range.

    Example:
        >>> low, selection = select_columns(torch.ones(3, 4), 1, side="right")
        >>> selection.indices.tolist(), low.round(decimals=4).flatten()
        ([0], tensor([2., 2., 2.]))
    """
    if G.ndim != 2:
        raise ValueError(f"`G` has shape {tuple(G.shape)}; takes a matrix (R, C)")
    checked_choice("basis", basis, BASES)
    if p not in (1, 2):
        raise ValueError(f"`p` is {p}; takes 1 or 2")
    side = checked_choice("side", side or ("right" if G.shape[0] >= G.shape[1] else "left"), ("left", "right"))
    rows = (G if side == "right" else G.T).to(torch.promote_types(G.dtype, torch.float32))
    if checked_count("rank", rank) > rows.shape[1]:
        raise ValueError(f"`rank` is {rank}; takes at most {rows.shape[1]}, the projected axis of {tuple(G.shape)}")
    coordinates = _coordinates(rows, basis)
    indices = coordinates.norm(p=p, dim=0).topk(rank).indices.sort().values
    low = coordinates[:, indices]
    return low if side == "right" else low.T, ColumnSelection(indices.int(), side)


def project_back(low: Tensor, selection: ColumnSelection, shape: tuple[int, int], *, basis: str = "dct") -> Tensor:
    """The matrix (R, C) that has these coordinates in the selected columns and none in the others.

    Raises:
        ValueError: for a basis or shape out of range.
    """
    checked_choice("basis", basis, BASES)
    right = selection.side == "right"
    expected = (shape[0], len(selection.indices)) if right else (len(selection.indices), shape[1])
    if tuple(low.shape) != expected:
        raise ValueError(f"`low` has shape {tuple(low.shape)}; takes {expected} for `shape` {tuple(shape)}")
    columns = basis_columns(selection.indices, shape[1] if right else shape[0], basis, low.dtype)
    return low @ columns if right else columns.T @ low
