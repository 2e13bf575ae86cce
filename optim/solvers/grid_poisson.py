"""Poisson's equation on the pixels of a mask: the operator, its sparse matrix, and its solver by multigrid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["GridPoisson", "Multigrid"]


class GridPoisson:
    """A x = -div(c grad x) on the pixels of a mask, with x = 0 on all others and beyond the picture's edges.

        (A x)_p = sum_{q next to p} c_pq (x_p - m_q x_q),  p in the mask

    It is symmetric and positive definite on the mask's pixels. With `edges="free"` no flux crosses the picture's own
    edges, and only pixels within the picture but outside the mask are held at 0: what blending into a picture needs.

    Args:
        mask: (H, W) bool, the unknown pixels; at least one.
        coefficient: (H, W) floating > 0, at the pixels; that of an edge is its two ends' mean. None is 1 everywhere.
        edges: "zero" (Dirichlet) or "free" (Neumann) at the picture's edges. "free" takes a mask that leaves a pixel
            of each of its parts' surroundings out, else A is singular.
        dtype: of the operator.

    Attributes:
        mask: (H, W), 1 at unknown pixels, of `dtype`.
        right: (H, W - 1), c on edges between horizontal neighbours that are both unknown.
        down: (H - 1, W), the same of vertical neighbours.
        diagonal: (H, W), A's diagonal; 0 outside the mask.

    Raises:
        ValueError: an empty mask, a coefficient that is not positive, or a singular operator.

    Example:
        >>> A = GridPoisson(torch.ones(2, 2, dtype=torch.bool))
        >>> A(torch.ones(2, 2)).tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """

    def __init__(
        self,
        mask: Tensor,
        coefficient: Tensor | None = None,
        *,
        edges: str = "zero",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"`mask` is {mask.dtype} {tuple(mask.shape)}; takes bool (H, W)")
        if not bool(mask.any()):
            raise ValueError("`mask` is empty: there are no unknown pixels")
        if edges not in ("zero", "free"):
            raise ValueError(f"`edges` is {edges!r}; takes 'zero' or 'free'")
        c = torch.ones(mask.shape, dtype=dtype, device=mask.device) if coefficient is None else coefficient.to(dtype)
        if c.shape != mask.shape or not bool((c > 0).all()) or not bool(torch.isfinite(c).all()):
            raise ValueError(f"`coefficient` takes finite numbers > 0 of shape {tuple(mask.shape)}")
        m = mask.to(dtype)
        right, down = (c[:, 1:] + c[:, :-1]) / 2, (c[1:] + c[:-1]) / 2
        diagonal = pad(right, (0, 1)) + pad(right, (1, 0)) + pad(down, (0, 0, 0, 1)) + pad(down, (0, 0, 1, 0))
        if edges == "zero":
            for row in (0, -1):
                diagonal[row] += c[row]
                diagonal[:, row] += c[:, row]
        self._set(m, right * m[:, 1:] * m[:, :-1], down * m[1:] * m[:-1], diagonal * m)
        if edges == "free":
            self._check_anchored(mask)

    def _set(self, mask: Tensor, right: Tensor, down: Tensor, diagonal: Tensor) -> None:
        self.mask, self.right, self.down, self.diagonal = mask, right, down, diagonal

    def to(self, device: torch.device | str) -> GridPoisson:
        """The operator on another device."""
        moved = GridPoisson.__new__(GridPoisson)
        moved._set(*(field.to(device) for field in (self.mask, self.right, self.down, self.diagonal)))
        return moved

    def __call__(self, x: Tensor) -> Tensor:
        """A x of (..., H, W); pixels outside the mask neither count nor get a value."""
        return self._with_neighbours(self.diagonal * x, x, -1)

    def residual(self, r: Tensor, x: Tensor) -> Tensor:
        """r - A x, of (..., H, W)."""
        return self._with_neighbours(torch.addcmul(r, self.diagonal, x, value=-1), x, 1)

    def _with_neighbours(self, y: Tensor, x: Tensor, sign: int) -> Tensor:
        """y plus or minus, in place, what A's entries off the diagonal (their absolute values) make of x."""
        y[..., 1:].addcmul_(self.right, x[..., :-1], value=sign)
        y[..., :-1].addcmul_(self.right, x[..., 1:], value=sign)
        y[..., 1:, :].addcmul_(self.down, x[..., :-1, :], value=sign)
        y[..., :-1, :].addcmul_(self.down, x[..., 1:, :], value=sign)
        return y

    def sparse(self) -> Any:
        """A on the mask's pixels, in their row-major order, as a `scipy.sparse.csr_array` of float64."""
        import numpy as np
        from scipy.sparse import coo_array

        inside = self.mask.bool().cpu().numpy()
        number = np.full(inside.shape, -1)
        number[inside] = np.arange(inside.sum())
        rows, columns, values = [number[inside]], [number[inside]], [self.diagonal.cpu().double().numpy()[inside]]
        for weight, a, b in ((self.right, number[:, :-1], number[:, 1:]), (self.down, number[:-1], number[1:])):
            there = weight.cpu().double().numpy()
            edge = there > 0
            rows += [a[edge], b[edge]]
            columns += [b[edge], a[edge]]
            values += [-there[edge]] * 2
        count = int(inside.sum())
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return coo_array(entries, shape=(count, count)).tocsr()

    def _check_anchored(self, mask: Tensor) -> None:
        """Each connected part of the mask needs a known neighbour."""
        from scipy.ndimage import label, sum_labels

        parts, count = label(mask.cpu().numpy())
        slack = self(torch.ones_like(self.mask)) * self.mask
        anchored = sum_labels(slack.cpu().double().numpy(), parts, range(1, count + 1))
        if (anchored <= 1e-9).any():
            raise ValueError(
                "`mask` has a part with no known pixel beside it, whose mean nothing fixes (the operator is singular)"
            )

    def coarsened(self) -> GridPoisson:
        """The operator on 2 x 2 blocks of pixels: P^T A P / 2 with P constant on blocks.

        The half makes up for the too steep blocks: a gradient across a block's edge is twice what it is for pixels.
        """
        height, width = (side + side % 2 for side in self.mask.shape)

        def summed(field: Tensor, rows: int, columns: int) -> Tensor:
            field = pad(field, (0, columns - field.shape[1], 0, rows - field.shape[0]))
            return field.reshape(rows // 2, 2, columns // 2, 2).sum((1, 3))

        full_right, full_down = pad(self.right, (0, 1)), pad(self.down, (0, 0, 0, 1))
        outer, inner = full_right.clone(), full_right.clone()
        outer[:, 0::2], inner[:, 1::2] = 0, 0
        outer_down, inner_down = full_down.clone(), full_down.clone()
        outer_down[0::2], inner_down[1::2] = 0, 0
        diagonal = summed(self.diagonal, height, width) - 2 * (
            summed(inner, height, width) + summed(inner_down, height, width)
        )
        coarse = GridPoisson.__new__(GridPoisson)
        right = summed(outer, height, width)[:, :-1]
        down = summed(outer_down, height, width)[:-1]
        coarse._set((diagonal > 0).to(diagonal), right / 2, down / 2, diagonal / 2)
        return coarse


class Multigrid:
    """An approximate inverse of a `GridPoisson` by a multigrid cycle: linear, symmetric, positive definite.

    As the `propose` of `conjugate_directions` it makes preconditioned CG whose iterations hardly grow with the
    picture. Blocks of 2 x 2 pixels make the coarse grids (aggregation), smoothing is by Jacobi's method damped by
    0.8 before and after, and coarse grids below `several` pixels a side are visited twice a cycle, which keeps the
    cost linear.

    Args:
        operator: A.
        smoothing: steps before and after the coarse grid, >= 1.
        twice_below: grids with shorter sides are visited twice from the next finer one.

    Example:
        >>> from trimtab.optim.solvers import conjugate_directions
        >>> A = GridPoisson(torch.ones(64, 64, dtype=torch.bool))
        >>> b = torch.ones(64, 64)
        >>> plain, fast = (conjugate_directions(A, b, propose=m, tolerance=1e-4) for m in (None, Multigrid(A)))
        >>> fast.iterations < plain.iterations / 3
        True
    """

    def __init__(self, operator: GridPoisson, *, smoothing: int = 2, twice_below: int = 300) -> None:
        if smoothing < 1:
            raise ValueError(f"`smoothing` is {smoothing}; takes an integer >= 1")
        self._smoothing, self._twice_below = smoothing, twice_below
        self._levels = [operator]
        while max(self._levels[-1].mask.shape) > 4:
            self._levels.append(self._levels[-1].coarsened())
        self._inverse_diagonals = [
            torch.where(level.diagonal > 0, 0.8 / level.diagonal.clamp_min(1e-30), 0) for level in self._levels
        ]
        self._bottom = _dense_inverse(self._levels[-1])

    def __call__(self, r: Tensor) -> Tensor:
        """About A^{-1} r, of (..., H, W)."""
        return self._cycle(0, r, None)

    def _cycle(self, level: int, r: Tensor, x: Tensor | None) -> Tensor:
        A, weight = self._levels[level], self._inverse_diagonals[level]
        if level == len(self._levels) - 1:
            return (r.flatten(-2) @ self._bottom).reshape(r.shape)
        x = weight * r if x is None else torch.addcmul(x, weight, A.residual(r, x))
        for _ in range(self._smoothing - 1):
            x = torch.addcmul(x, weight, A.residual(r, x))
        coarse = _restricted(A.residual(r, x))
        e = self._cycle(level + 1, coarse, None)
        if max(self._levels[level + 1].mask.shape) < self._twice_below and level + 1 < len(self._levels) - 1:
            e = self._cycle(level + 1, coarse, e)
        fine = e.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., : r.shape[-2], : r.shape[-1]]
        x = torch.addcmul(x, fine, A.mask)
        for _ in range(self._smoothing):
            x = torch.addcmul(x, weight, A.residual(r, x))
        return x


def _restricted(r: Tensor) -> Tensor:
    """Sums over 2 x 2 blocks."""
    height, width = r.shape[-2:]
    r = pad(r, (0, width % 2, 0, height % 2))
    return r.reshape(*r.shape[:-2], r.shape[-2] // 2, 2, r.shape[-1] // 2, 2).sum((-3, -1))


def _dense_inverse(operator: GridPoisson) -> Tensor:
    height, width = operator.mask.shape
    unit = torch.eye(height * width, dtype=operator.mask.dtype, device=operator.mask.device)
    matrix = operator(unit.reshape(-1, height, width)).flatten(1)
    return torch.linalg.pinv(matrix.double(), hermitian=True).to(unit)
