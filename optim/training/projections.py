"""The subspaces in which FRUGAL keeps state: drawn, applied, undone, and changed for others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .dct import basis_columns, select_columns

__all__ = ["BLOCK_ORDERS", "KINDS", "SIDES", "Basis", "Entries", "Projection", "active_blocks", "draw", "stored"]

KINDS = ("columns", "rows", "randk", "randperm", "svd", "random", "dct", "blockwise")
SIDES = ("std", "reverse_std", "left", "right", "full")
BLOCK_ORDERS = ("random", "ascending", "descending", "mirror")


@dataclass(frozen=True)
class Entries:
    """Columns (dim 1), rows (dim 0) or single entries (dim None) of a matrix, by their indices."""

    indices: Tensor
    dim: int | None

    def down(self, matrix: Tensor) -> Tensor:
        """Coordinates of a matrix (n, m)."""
        if self.dim is None:
            return matrix.flatten()[self.indices.long()]
        return matrix.index_select(self.dim, self.indices)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates, and what is left of the matrix."""
        rest = matrix.clone()
        if self.dim is None:
            rest.view(-1)[self.indices.long()] = 0
        else:
            rest.index_fill_(self.dim, self.indices.long(), 0)
        return self.down(matrix), rest

    def join(self, low: Tensor, rest: Tensor) -> Tensor:
        """The matrix of coordinates and remainder; uses ``rest``, which is 0 at the indices."""
        if self.dim is None:
            rest.view(-1)[self.indices.long()] = low
            return rest
        return rest.index_copy_(self.dim, self.indices.long(), low)


@dataclass(frozen=True)
class Basis:
    """Coordinates left^T G right; a None stands for the identity. left (n, r), right (m, r), columns orthonormal."""

    left: Tensor | None
    right: Tensor | None

    def down(self, matrix: Tensor) -> Tensor:
        """Coordinates of a matrix (n, m)."""
        matrix = matrix if self.left is None else self.left.T @ matrix
        return matrix if self.right is None else matrix @ self.right

    def up(self, low: Tensor) -> Tensor:
        """The matrix of such coordinates."""
        low = low if self.left is None else self.left @ low
        return low if self.right is None else low @ self.right.T

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates, and what is left of the matrix: zero where that is rounding, whose sign would be a full step."""
        low = self.down(matrix)
        rest = matrix - self.up(low)
        return low, rest * (rest.norm() > 64 * torch.finfo(matrix.dtype).eps * matrix.norm())

    def join(self, low: Tensor, rest: Tensor) -> Tensor:
        """The matrix of coordinates and remainder; uses ``rest``."""
        return rest.add_(self.up(low))


Projection = Entries | Basis


def draw(
    kind: str, side: str, density: float, gradient: Tensor, generator: torch.Generator
) -> tuple[Projection, dict[str, Tensor]] | None:
    """A projection for a gradient (n, m), and the tensors that `stored` makes it from; None for no coordinates.

    Args:
        kind: one of `KINDS` but "blockwise".
        side: for "svd", "random", "dct" and "randperm", which axis is projected: "std" the shorter one as GaLore does
            (the rows' axis m where n >= m), "reverse_std" the other, "left" n, "right" m, "full" both.
        density: share of the coordinates; of each axis.
        gradient: finite.
        generator: on the CPU.
    """
    n, m = gradient.shape
    if kind in ("columns", "rows", "randk"):
        total = {"columns": m, "rows": n, "randk": n * m}[kind]
        count = math.floor(total * density + 1e-9)
        if not count:
            return None
        indices = torch.randperm(total, generator=generator)[:count].sort().values
        indices = indices.to(gradient.device, torch.int32 if total < 2**31 else torch.int64)
        return _made(kind, side, {"indices": indices}, gradient)
    side = _side(side, n, m)
    length = min(n, m) if side == "full" else m if side == "right" else n
    rank = min(round(length * density), length)
    if not rank:
        return None
    if kind == "randperm":
        drawn = torch.randperm(length, generator=generator)[:rank].sort().values
        return _made(kind, side, {"indices": drawn.to(gradient.device, torch.int32)}, gradient)
    if kind == "dct":
        _, selection = select_columns(gradient, rank, side=side)
        return _made(kind, side, {"indices": selection.indices}, gradient)
    return _made(kind, side, _matrices(kind, side, rank, gradient, generator), gradient)


def _matrices(kind: str, side: str, rank: int, gradient: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = {
        name: length for name, length in zip(("left", "right"), gradient.shape, strict=True) if side in (name, "full")
    }
    if kind == "svd":
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        vectors = {"left": U, "right": Vh.T}  # fewer than the longer axis may ask for span all of the gradient
        return {name: vectors[name][:, :rank].contiguous() for name in lengths}
    gaussian = {name: torch.randn(n, rank, generator=generator, dtype=torch.float64) for name, n in lengths.items()}
    return {name: torch.linalg.qr(value)[0].to(gradient) for name, value in gaussian.items()}


def _made(
    kind: str, side: str, tensors: dict[str, Tensor], gradient: Tensor
) -> tuple[Projection, dict[str, Tensor]] | None:
    projection = stored(kind, side, tensors, gradient)
    return None if projection is None else (projection, tensors)


def stored(kind: str, side: str, state: dict[str, Tensor], gradient: Tensor) -> Projection | None:
    """The projection whose tensors lie in a parameter's state; None where there are none.

    Args:
        kind: see `draw`.
        side: see `draw`.
        state: may hold "indices", "left", "right".
        gradient: (n, m), for its shape and dtype.
    """
    n, m = gradient.shape
    if kind in ("svd", "random"):
        left, right = state.get("left"), state.get("right")
        return None if left is None and right is None else Basis(left, right)
    indices = state.get("indices")
    if indices is None:
        return None
    if kind in ("columns", "rows", "randk"):
        return Entries(indices, {"columns": 1, "rows": 0, "randk": None}[kind])
    right = _side(side, n, m) == "right"
    if kind == "randperm":
        return Entries(indices, 1 if right else 0)
    columns = basis_columns(indices, m if right else n, "dct", gradient.dtype).T
    return Basis(None, columns) if right else Basis(columns, None)


def _side(side: str, n: int, m: int) -> str:
    if side in ("std", "reverse_std"):
        return "right" if (n >= m) == (side == "std") else "left"
    return side


def active_blocks(order: str, count: int, density: float, refresh: int, generator: torch.Generator) -> set[int]:
    """Which of `count` tensors hold state after the `refresh`-th change: round(density count) of them.

    Ascending and descending orders go on where the last change ended; "mirror" takes pairs from both ends inwards, and
    one more of them at the middle where the number is odd.
    """
    size = min(round(density * count), count)
    if order == "random":
        return set(torch.randperm(count, generator=generator)[:size].tolist())
    start = refresh * size
    line = list(range(count))
    if order == "descending":
        line.reverse()
    elif order == "mirror":
        line = [index for pair in zip(line, reversed(line), strict=True) for index in pair][:count]
    return {line[(start + offset) % count] for offset in range(size)} if count else set()
