"""The sliced cost with its gradient in one pass, chunk by chunk: nothing of size (B, L, N) is ever held.

A sorted difference knows its own derivative, so the gradients in the points, (B, N, d), and in the directions,
(B, L, d), are accumulated while the value is computed, and only they are kept for the backward pass. Second
derivatives are computed anew by plain operations, with memory O(B L N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .one_dimensional import _cumulative, merged_quantiles, wasserstein_1d, weighted_quantiles
from .sorting import sort_rows, sort_rows_with_order
from .threads import in_threads, num_parts

__all__ = ["SlicedCost", "chunks", "slice_costs"]

_CPU_ELEMENTS = 1 << 19  # 2 MB of float32 a thread: a chunk stays in the cache
_OTHER_ELEMENTS = 1 << 24


class SlicedCost(torch.autograd.Function):
    """Mean over slices of ``W_p^p`` of the projections, (B,).

    Takes x (B, N, d), y (B, M, d) or None, directions (B, L, d), weights (B, N) and (B, M) float64 or None, sorted
    projections (B or 1, L, M) of y or None (then y is None), p, the sort's backend and the slices a chunk or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        theta: Tensor,
        x_weights: Tensor | None,
        y_weights: Tensor | None,
        v_sorted: Tensor | None,
        p: float,
        backend: str,
        chunk_size: int | None,
    ) -> Tensor:
        inputs = (x, y, theta, x_weights, y_weights, v_sorted)
        options = {"p": p, "backend": backend, "chunk_size": chunk_size, "wants": ctx.needs_input_grad[:3]}
        cost, *grads = _cost_in_parts(inputs, **options)
        ctx.save_for_backward(*grads, *inputs)
        ctx.p = p
        return cost

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: second derivatives, through plain operations
            return (*_differentiable_gradients(ctx, upstream), *[None] * 6)
        factor = upstream[:, None, None]
        return (*(None if grad is None else factor * grad for grad in ctx.saved_tensors[:3]), *[None] * 6)


def _cost_in_parts(
    inputs: Sequence[Tensor | None], **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The cost (B,) and its gradients; on a CPU in a thread for each part of the clouds, or of the slices of few."""
    x, y, theta, x_weights, y_weights, v_sorted = inputs
    batch, count = theta.shape[:2]
    parts = num_parts(max(batch, count), batch * count * x.shape[1]) if x.device.type == "cpu" else 1
    of_slices = parts > batch
    pieces = []
    for i in range(parts):
        part = slice((count if of_slices else batch) * i // parts, (count if of_slices else batch) * (i + 1) // parts)
        clouds, slices = (slice(None), part) if of_slices else (part, slice(None))
        of_target = clouds if v_sorted is not None and len(v_sorted) > 1 else slice(None)
        own = [None if t is None else t[clouds] for t in (x, y, theta[:, slices], x_weights, y_weights)]
        pieces.append((*own, None if v_sorted is None else v_sorted[of_target, slices]))
    found = list(zip(*in_threads(partial(_cost_and_gradients, **options), pieces), strict=True))
    join = [lambda some: torch.stack(some).sum(0)] * 3 + [partial(torch.cat, dim=1)] if of_slices else [torch.cat] * 4
    values = (None if some[0] is None else put(some) for put, some in zip(join, found, strict=True))
    return tuple(None if value is None else value.div_(count) for value in values)


def _cost_and_gradients(
    x: Tensor,
    y: Tensor | None,
    theta: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    v_sorted: Tensor | None,
    *,
    p: float,
    backend: str,
    chunk_size: int | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sums over slices: cost (B,) and gradients in x, y and directions where wanted, chunk by chunk."""
    wants_x, wants_y, wants_theta = wants
    cost = x.new_zeros(len(x))
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if wants_x else None
    grad_y = torch.zeros_like(y, memory_format=torch.contiguous_format) if wants_y else None
    grad_theta = x.new_zeros(theta.shape) if wants_theta else None
    longest = max(x.shape[1], (v_sorted if y is None else y.mT).shape[-1])
    memory = _Memory(x)
    for clouds, slices in chunks(*theta.shape[:2], longest, x.device, chunk_size):
        directions = theta[clouds, slices]
        points, others = x[clouds], None if y is None else y[clouds]
        ordered = wants_x or wants_theta or x_weights is not None
        u, u_order = _sorted_projections(points, directions, backend, memory, "u", ordered=ordered)
        if y is None:
            v, v_order = v_sorted[clouds if len(v_sorted) > 1 else slice(None), slices], None
        else:
            ordered = wants_y or wants_theta or y_weights is not None
            v, v_order = _sorted_projections(others, directions, backend, memory, "v", ordered=ordered)
        weights = [None if w is None else w[clouds, None] for w in (x_weights, y_weights)]
        value, slope_u, slope_v = _compare(u, v, u_order, v_order, *weights, p, any(wants))
        cost[clouds] += value.sum(-1)
        if wants_x or wants_theta:
            slope = memory.take("slope", u.shape).scatter_(-1, u_order, slope_u)  # back in the points' order
            if wants_x:
                grad_x[clouds] += slope.mT @ directions
            if wants_theta:
                grad_theta[clouds, slices] = slope @ points
        if wants_y or wants_theta:
            slope = memory.take("slope", v.shape).scatter_(-1, v_order, slope_v)
            if wants_y:
                grad_y[clouds] -= slope.mT @ directions
            if wants_theta:
                grad_theta[clouds, slices] -= slope @ others
    return cost, grad_x, grad_y, grad_theta


def _differentiable_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    x, y, theta, x_weights, y_weights, v_sorted = ctx.saved_tensors[3:]
    weights = [None if w is None else w[:, None].to(x.dtype) for w in (x_weights, y_weights)]
    v = v_sorted if y is None else theta @ y.mT
    cost = wasserstein_1d(theta @ x.mT, v, *weights, p=ctx.p).mean(-1)
    wanted = [t for t, needed in zip((x, y, theta), ctx.needs_input_grad[:3], strict=True) if needed]
    found = iter(torch.autograd.grad(cost, wanted, upstream, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


@torch.no_grad()
def slice_costs(
    x: Tensor,
    y: Tensor,
    theta: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    p: float,
    backend: str,
    chunk_size: int | None = None,
) -> Tensor:
    """``W_p^p`` along each direction, (B, L), without gradients; arguments as :class:`SlicedCost`'s."""
    cost, memory = x.new_empty(theta.shape[:2]), _Memory(x)
    for clouds, slices in chunks(*theta.shape[:2], max(x.shape[1], y.shape[1]), x.device, chunk_size):
        own = (theta[clouds, slices], backend, memory)
        u, u_order = _sorted_projections(x[clouds], *own, "u", ordered=x_weights is not None)
        v, v_order = _sorted_projections(y[clouds], *own, "v", ordered=y_weights is not None)
        weights = [None if w is None else w[clouds, None] for w in (x_weights, y_weights)]
        cost[clouds, slices] = _compare(u, v, u_order, v_order, *weights, p, False)[0]
    return cost


def chunks(
    clouds: int, slices: int, points: int, device: torch.device, chunk_size: int | None
) -> Iterator[tuple[slice, slice]]:
    """Ranges of clouds and of slices whose projections fit the cache (CPU) or some 64 MB (elsewhere)."""
    budget = _CPU_ELEMENTS if device.type == "cpu" else _OTHER_ELEMENTS
    at_once = chunk_size or max(1, budget // points)
    at_once = min(at_once, slices)
    group = min(clouds, max(1, budget // (points * at_once)))
    for first in range(0, clouds, group):
        for start in range(0, slices, at_once):
            yield slice(first, min(first + group, clouds)), slice(start, min(start + at_once, slices))


class _Memory:
    """Memory that chunk after chunk uses again: to get megabytes anew costs as much as to sort them."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor with anything in it, on the device of ``like``; valid until ``name`` is taken again."""
        count = math.prod(shape)
        if name not in self.held or self.held[name].numel() < count:
            self.held[name] = torch.empty(count, dtype=dtype or self.like.dtype, device=self.like.device)
        return self.held[name][:count].view(shape)


def _sorted_projections(
    points: Tensor, directions: Tensor, backend: str, memory: _Memory, name: str, *, ordered: bool
) -> tuple[Tensor, Tensor | None]:
    """Projections (B, L, N) of points (B, N, d), ascending, and the permutation where it is needed."""
    shape = (*directions.shape[:2], points.shape[1])
    rows = torch.matmul(directions, points.mT, out=memory.take(name, shape))
    if not ordered:
        return sort_rows(rows, backend), None
    order = memory.take(f"{name}'s order", shape, torch.int64) if backend == "numpy" else None
    return sort_rows_with_order(rows, backend, order)


def _compare(
    u: Tensor,
    v: Tensor,
    u_order: Tensor | None,
    v_order: Tensor | None,
    u_weights: Tensor | None,
    v_weights: Tensor | None,
    p: float,
    wants_slopes: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``W_p^p`` a row of sorted projections, its slopes in ``u`` and minus those in ``v``; may overwrite ``u``."""
    n, m = u.shape[-1], v.shape[-1]
    if u_weights is None and v_weights is None and n == m:
        gap = torch.sub(u, v, out=u) if u.shape == v.shape else u - v
        value = (torch.linalg.vecdot(gap, gap) if p == 2 else _power(gap, p).sum(-1)) / n
        if not wants_slopes:
            return value, None, None
        slope = _power_slope(gap, p).div_(n)
        return value, slope, slope
    if u_weights is None and v_weights is None:
        from_u, from_v, width = merged_quantiles(n, m, u.device)
        width = width.to(u.dtype)
        gap = u[..., from_u] - v[..., from_v]
        from_u, from_v = from_u.expand(gap.shape), from_v.expand(gap.shape)
    else:
        # Without weights and without need of an order the rows were sorted bare; equal weights need no order.
        u_ends = _cumulative(u_weights, u if u_order is None else u_order)
        v_ends = _cumulative(v_weights, v.expand(*u.shape[:-1], m) if v_order is None else v_order)
        from_u, from_v, width = weighted_quantiles(u_ends, v_ends, u.dtype)
        gap = u.gather(-1, from_u) - v.expand(*u.shape[:-1], m).gather(-1, from_v)
    value = (_power(gap, p) * width).sum(-1)
    if not wants_slopes:
        return value, None, None
    slope = _power_slope(gap, p).mul_(width)
    slope_u = torch.zeros_like(u).scatter_add_(-1, from_u, slope)
    slope_v = u.new_zeros(*u.shape[:-1], m).scatter_add_(-1, from_v, slope)
    return value, slope_u, slope_v


def _power(gap: Tensor, p: float) -> Tensor:
    return gap.square() if p == 2 else gap.abs().pow_(p)


def _power_slope(gap: Tensor, p: float) -> Tensor:
    """The derivative of ``|gap| ** p``; overwrites ``gap``."""
    if p == 2:
        return gap.mul_(2.0)
    if p == 1:
        return gap.sign_()
    return gap.abs().pow_(p - 1.0).mul_(p).mul_(gap.sign())
