"""Sorting many short rows fast.

On a CPU numpy's vectorized sort of float32 or float64 rows is an order of magnitude faster than ``torch.sort``. It
gives no permutation, so where one is needed each float32 key becomes a float64 with its index in the 29 low bits of the
mantissa that the conversion leaves zero; after sorting, those bits are the permutation, and rounding back to float32
gives the exact value.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .threads import in_threads, num_parts

__all__ = ["sort_rows", "sort_rows_with_order"]

_INDEX_BITS = 28  # one less than are free: rounding back to float32 must not reach the next value
_INDEX_MASK = (1 << 29) - 1
_BLOCK = 1 << 16  # keys that are packed, sorted and unpacked at once, so that they stay in the cache


def sort_rows(rows: Tensor, backend: str) -> Tensor:
    """Ascending along the last axis; ``rows``, which is contiguous, may be overwritten.

    Args:
        rows: (..., N) float32 or float64.
        backend: ``"numpy"`` (CPU) or ``"torch"``.
    """
    if backend == "torch":
        return rows.sort(dim=-1).values
    array = rows.numpy().reshape(-1, rows.shape[-1])
    in_threads(lambda start, stop: array[start:stop].sort(axis=-1), _ranges(array.shape))
    return rows


def sort_rows_with_order(rows: Tensor, backend: str, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ascending along the last axis, with the int64 permutation that does it; ``rows`` may be overwritten.

    Args:
        rows: (..., N) float32 or float64, contiguous.
        backend: ``"numpy"`` (CPU) or ``"torch"``.
        order: int64 of the rows' shape, contiguous, which "numpy" fills instead of new memory.
    """
    if backend == "torch":
        return rows.sort(dim=-1)
    array = rows.numpy().reshape(-1, rows.shape[-1])
    permutation = torch.empty(rows.shape, dtype=torch.int64) if order is None else order
    order = permutation.numpy().reshape(array.shape)
    packed = array.dtype == np.float32 and array.shape[-1] < 1 << _INDEX_BITS

    def sort(start: int, stop: int) -> None:
        if not packed:
            order[start:stop] = np.argsort(array[start:stop], axis=-1)
            return
        index = np.arange(array.shape[-1], dtype=np.int64)
        block = max(1, _BLOCK // array.shape[-1])
        buffer = np.empty((min(block, stop - start), array.shape[-1]))
        for first in range(start, stop, block):
            rows_here = slice(first, min(first + block, stop))
            keys = buffer[: rows_here.stop - first]
            keys[:] = array[rows_here]
            bits = keys.view(np.int64)
            bits |= index
            keys.sort(axis=-1)
            np.bitwise_and(bits, _INDEX_MASK, out=order[rows_here])
            array[rows_here] = keys

    in_threads(sort, _ranges(array.shape))
    return (rows if packed else rows.gather(-1, permutation)), permutation


def _ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First row and end of each part."""
    parts = num_parts(shape[0], shape[0] * shape[1])
    bounds = [shape[0] * i // parts for i in range(parts + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))
