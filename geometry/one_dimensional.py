"""Wasserstein distances on the line, where sorting solves optimal transport."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .clouds import check_number

__all__ = ["check_order", "merged_quantiles", "wasserstein_1d", "weighted_quantiles"]


def wasserstein_1d(
    u: Tensor, v: Tensor, u_weights: Tensor | None = None, v_weights: Tensor | None = None, *, p: float = 2.0
) -> Tensor:
    r"""``W_p^p`` of weighted points on the line, in plain torch operations.

    :math:`W_p^p = \int_0^1 |F_u^{-1}(q) - F_v^{-1}(q)|^p dq`, the difference of the quantile functions. Differentiable
    any number of times in ``u`` and ``v`` (almost everywhere).

    Args:
        u: (..., N) floating point.
        v: (..., M), with the same leading axes up to broadcasting.
        u_weights: as ``u``, >= 0, each row of sum one; None for equal weights.
        v_weights: as ``v``.
        p: order, >= 1.

    Returns:
        (...).

    Raises:
        TypeError: ``p`` is no number.
        ValueError: ``p`` below 1 or infinite.

    Example:
        >>> wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]), p=1)
        tensor(2.)
    """
    check_order(p)
    if u_weights is None and v_weights is None:
        u, v = u.sort(dim=-1).values, v.sort(dim=-1).values
        if u.shape[-1] == v.shape[-1]:
            return (u - v).abs().pow(p).mean(-1)
        from_u, from_v, width = merged_quantiles(u.shape[-1], v.shape[-1], u.device)
        return ((u[..., from_u] - v[..., from_v]).abs().pow(p) * width.to(u.dtype)).sum(-1)
    leading = torch.broadcast_shapes(u.shape[:-1], v.shape[:-1])
    u, v = u.expand(*leading, -1), v.expand(*leading, -1)
    u, u_order = u.sort(dim=-1)
    v, v_order = v.sort(dim=-1)
    from_u, from_v, width = weighted_quantiles(
        _cumulative(u_weights, u_order), _cumulative(v_weights, v_order), u.dtype
    )
    return ((u.gather(-1, from_u) - v.gather(-1, from_v)).abs().pow(p) * width).sum(-1)


def check_order(p: float) -> None:
    """Refuses an order p below 1.

    Raises:
        TypeError: ``p`` is no number.
        ValueError: ``p`` is below 1, NaN, infinite, or a whole number that no tensor holds.
    """
    largest = 2**63 if isinstance(p, int) else float("inf")
    check_number(p, "p", lambda value: 1 <= value < largest, "a finite number >= 1")


@functools.lru_cache(maxsize=64)
def merged_quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the quantile functions of n and of m equal weights step, exactly, in whole numbers.

    Returns:
        from_u (K,) and from_v (K,), which sorted point each piece takes, and the pieces' widths (K,) float64.
    """
    u_ends = torch.arange(1, n + 1) * m  # in units of 1 / (n m)
    v_ends = torch.arange(1, m + 1) * n
    ends = torch.cat([u_ends, v_ends]).unique()
    width = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    return torch.searchsorted(u_ends, ends).to(device), torch.searchsorted(v_ends, ends).to(device), width.to(device)


def weighted_quantiles(u_ends: Tensor, v_ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`merged_quantiles` for cumulative weights (..., N) and (..., M), float64, that end at one.

    Returns:
        from_u and from_v (..., N + M) int64 and the widths (..., N + M) of ``dtype``; pieces may have no width.
    """
    ends = torch.cat([u_ends, v_ends], dim=-1).sort(dim=-1).values
    width = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[..., :1]))
    from_u = torch.searchsorted(u_ends.contiguous(), ends).clamp_(max=u_ends.shape[-1] - 1)
    from_v = torch.searchsorted(v_ends.contiguous(), ends).clamp_(max=v_ends.shape[-1] - 1)
    return from_u, from_v, width.to(dtype)


def _cumulative(weights: Tensor | None, order: Tensor) -> Tensor:
    """Cumulative weights in sorted order; None stands for equal ones."""
    n = order.shape[-1]
    if weights is None:
        return (torch.arange(1, n + 1, device=order.device, dtype=torch.float64) / n).expand(order.shape)
    ends = weights.double().expand(order.shape).gather(-1, order).cumsum(-1)
    return ends / ends[..., -1:]
