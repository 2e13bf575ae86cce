"""The sliced Wasserstein distance between batches of point clouds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .clouds import CloudPair, check_cloud, check_pair, safe_root
from .directions import Directions, sample_directions
from .one_dimensional import check_order, wasserstein_1d
from .sliced_cost import SlicedCost, chunks, slice_costs
from .sorting import sort_rows

__all__ = ["Backend", "Reduction", "SlicedTarget", "sliced_wasserstein"]

Backend = Literal["auto", "numpy", "torch", "autograd"]
Reduction = Literal["none", "mean", "slices"]
_BACKENDS = ("auto", "numpy", "torch", "autograd")
_REDUCTIONS = ("none", "mean", "slices")


class SlicedTarget:
    """A fixed cloud with its sorted projections along a pool of directions, for many distances to it.

    Passed to :func:`sliced_wasserstein` in the place of ``y``, which then sorts only ``x``. Each call draws its
    directions from the pool without replacement, or takes all.

    Args:
        cloud: (M, d), or (B, M, d) for a target a cloud.
        num_projections: size of the pool.
        directions: kind of directions, see :func:`~trimtab.geometry.sample_directions`.
        generator: of the random numbers.

    Attributes:
        projections: the pool, (P, d).
        sorted: the cloud's sorted projections (1 or B, P, M), float32 or float64.

    Raises:
        TypeError: the cloud is no floating-point tensor.
        ValueError: it has a wrong shape, is empty or not finite.
    """

    def __init__(
        self,
        cloud: Tensor,
        *,
        num_projections: int = 1000,
        directions: Directions = "quasi",
        generator: torch.Generator | None = None,
    ) -> None:
        check_cloud(cloud, "cloud")
        self.batched = cloud.ndim == 3
        self.dtype = cloud.dtype
        points = cloud.detach().to(torch.promote_types(cloud.dtype, torch.float32)).reshape(-1, *cloud.shape[-2:])
        self.projections = sample_directions(
            num_projections,
            points.shape[-1],
            kind=directions,
            generator=generator,
            device=points.device,
            dtype=points.dtype,
        )
        self.sorted = points.new_empty(len(points), num_projections, points.shape[1])
        backend = "numpy" if points.device.type == "cpu" else "torch"
        theta = self.projections.expand(len(points), -1, -1)
        for clouds, slices in chunks(len(points), num_projections, points.shape[1], points.device, None):
            rows = (theta[clouds, slices] @ points[clouds].mT).contiguous()
            self.sorted[clouds, slices] = sort_rows(rows, backend)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor | SlicedTarget,
    *,
    num_projections: int = 100,
    p: float = 2.0,
    projections: Tensor | None = None,
    directions: Directions = "iid",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    root: bool = False,
    reduction: Reduction = "none",
    pairwise: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""The sliced Wasserstein cost ``SW_p^p`` between clouds, pair by pair.

    :math:`SW_p^p(X, Y) = \mathbb{E}_\theta W_p^p(\theta^\top X, \theta^\top Y) \approx \frac1L \sum_l W_p^p` with
    unit vectors ``theta``, the same for all clouds of a batch (Bonneel et al. 2015; "Self-Attention Amortized
    Distributional Projection Optimization for Sliced Wasserstein Point-Cloud Reconstruction", arXiv 2301.04791). The
    cost is a mean over points; that paper's is their sum. ``root=True`` gives the distance, POT's convention.
    Time is O(B L N (log N + d)), and beyond the inputs memory is O(B N d).

    Args:
        x: (B, N, d), or (N, d) for one cloud; float16 to float64. Half precision is computed in float32.
        y: (B, M, d) or (M, d); M may differ from N. A :class:`SlicedTarget` is a fixed cloud sorted beforehand.
        num_projections: number L of directions to draw; for a target at most those of its pool.
        p: order, >= 1.
        projections: directions (L, d) or (B, L, d) to use as they are, differentiable; None draws them.
        directions: how they are drawn: ``"iid"``, ``"orthogonal"`` or ``"quasi"``; the latter two vary less.
        x_weights: (B, N) or (N,), weights >= 0 or a mask (bool); points of weight zero may hold anything.
        y_weights: likewise for ``y``.
        root: whether to return the p-th root, whose gradient is 0 where the cost is 0.
        reduction: ``"none"`` a value a cloud, ``"mean"`` their mean, ``"slices"`` a value a cloud and direction.
        pairwise: compare every cloud of ``x`` with every cloud of ``y``; the batches may differ.
        generator: of the random directions.
        chunk_size: number of directions at once; None takes what fits the cache.
        backend: ``"numpy"`` sorts on the CPU, ``"torch"`` anywhere, ``"auto"`` picks. Their gradients are made in the
            forward pass. ``"autograd"`` is plain torch, for ``torch.func`` and ``torch.compile``, with memory
            O(B L N); second derivatives, and gradients of ``reduction="slices"`` and ``pairwise``, use it anyway.

    Returns:
        (B,), or a scalar for one cloud or ``reduction="mean"``; (B, L) or (L,) for ``"slices"``; (A, B) for
        ``pairwise``. The dtype is that of the clouds.

    Raises:
        TypeError: clouds or weights of a wrong type.
        ValueError: shapes that do not fit, empty or non-finite clouds, p < 1, an option out of range.

    Example:
        >>> x = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> shifted = x + torch.tensor([3.0, 0.0, 0.0])  # SW_2^2 of a shift t is |t|^2 / d
        >>> sliced_wasserstein(x, shifted, num_projections=999, directions="quasi").round(decimals=2)
        tensor([3., 3.])
    """
    _check_options(p, reduction, backend, chunk_size, pairwise)
    if isinstance(y, SlicedTarget):
        if projections is not None or x_weights is not None or y_weights is not None or pairwise:
            raise ValueError("`projections`, `x_weights`, `y_weights` and `pairwise` do not go with a SlicedTarget")
        cost, batched, dtype = _cost_to_target(x, y, num_projections, p, reduction, generator, chunk_size, backend)
    else:
        pair = check_pair(x, y, x_weights, y_weights, pairwise=pairwise)
        theta = _directions(pair, num_projections, projections, directions, generator)
        if pairwise and theta.ndim == 3:
            raise ValueError(f"`projections` must have shape (L, d) with `pairwise`, got {tuple(theta.shape)}")
        if pairwise:
            with torch.autocast(pair.x.device.type, enabled=False):
                cost = _pairwise_cost(pair, theta, p, chunk_size, backend)
        else:
            theta = theta if theta.ndim == 3 else theta.expand(len(pair.x), -1, -1)
            cost = paired_cost(pair, theta, p, backend, chunk_size, slices=reduction == "slices")
        batched, dtype = pair.batched, pair.dtype
    if root:
        cost = safe_root(cost, p)
    if not batched:
        cost = cost[0, 0] if pairwise else cost[0]
    return (cost.mean() if reduction == "mean" else cost).to(dtype)


def paired_cost(
    pair: CloudPair,
    theta: Tensor,
    p: float,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    *,
    slices: bool = False,
) -> Tensor:
    """Mean over slices (B,), or each slice's (B, L), of ``W_p^p`` along given directions (B, L, d)."""
    with torch.autocast(theta.device.type, enabled=False):
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (pair.x, pair.y, theta))
        if (slices and differentiable) or backend == "autograd" or torch.compiler.is_compiling():
            weights = [None if w is None else w[:, None].to(theta.dtype) for w in (pair.x_weights, pair.y_weights)]
            cost = wasserstein_1d(theta @ pair.x.mT, theta @ pair.y.mT, *weights, p=p)
            return cost if slices else cost.mean(-1)
        sort, weights = sorting_backend(backend, pair.x), (pair.x_weights, pair.y_weights)
        if slices:
            return slice_costs(pair.x, pair.y, theta, *weights, p, sort, chunk_size)
        return SlicedCost.apply(pair.x, pair.y, theta, *weights, None, p, sort, chunk_size)


def sorting_backend(backend: Backend, x: Tensor) -> str:
    """The sort behind ``"auto"``.

    Raises:
        ValueError: numpy is asked to sort what is not on the CPU.
    """
    if backend == "auto":
        return "numpy" if x.device.type == "cpu" else "torch"
    if backend == "numpy" and x.device.type != "cpu":
        raise ValueError(f"`backend='numpy'` takes clouds on the CPU, got {x.device}")
    return backend


def _cost_to_target(
    x: Tensor,
    target: SlicedTarget,
    num_projections: int,
    p: float,
    reduction: Reduction,
    generator: torch.Generator | None,
    chunk_size: int | None,
    backend: Backend,
) -> tuple[Tensor, bool, torch.dtype]:
    check_cloud(x, "x")
    points = x.reshape(-1, *x.shape[-2:]).to(target.sorted.dtype)
    if points.shape[-1] != target.projections.shape[-1] or x.device != target.sorted.device:
        wanted = f"dimension {target.projections.shape[-1]} on {target.sorted.device}"
        raise ValueError(f"`x` must have the target's {wanted}, got {points.shape[-1]} on {x.device}")
    if target.batched and (x.ndim != 3 or len(x) != len(target.sorted)):
        raise ValueError(f"`x` must be a batch of the target's {len(target.sorted)} clouds, got {tuple(x.shape)}")
    theta, sorted_target = target.projections, target.sorted
    sample_directions(num_projections, 1)  # checks the number
    if num_projections < len(theta):
        device = generator.device if generator is not None else x.device
        chosen = torch.randperm(len(theta), generator=generator, device=device)[:num_projections].to(x.device)
        theta, sorted_target = theta[chosen], sorted_target[:, chosen]
    theta = theta.expand(len(points), -1, -1)
    with torch.autocast(x.device.type, enabled=False):
        if reduction == "slices" or backend == "autograd" or torch.compiler.is_compiling():
            cost = wasserstein_1d(theta @ points.mT, sorted_target, p=p)
            cost = cost if reduction == "slices" else cost.mean(-1)
        else:
            sort = sorting_backend(backend, x)
            cost = SlicedCost.apply(points, None, theta, None, None, sorted_target, p, sort, chunk_size)
    return cost, x.ndim == 3, torch.promote_types(x.dtype, target.dtype)


def _pairwise_cost(pair: CloudPair, theta: Tensor, p: float, chunk_size: int | None, backend: Backend) -> Tensor:
    """(A, B): each cloud is sorted once a chunk of directions."""
    x, y = pair.x, pair.y
    if pair.x_weights is not None or pair.y_weights is not None:
        raise ValueError("`pairwise` takes no weights; compare pair by pair")
    plain = backend == "autograd" or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, theta)))
    sort = None if plain else sorting_backend(backend, x)
    cost = x.new_zeros(len(x), len(y))
    for _, slices in chunks(1, len(theta), (len(x) + len(y)) * max(x.shape[1], y.shape[1]), x.device, chunk_size):
        rows = [theta[slices] @ cloud.mT for cloud in (x, y)]
        u, v = (r.sort(-1).values if sort is None else sort_rows(r.contiguous(), sort) for r in rows)
        cost = cost + torch.stack([_sorted_cost(one, v, p) for one in u])
    return cost / len(theta)


def _sorted_cost(u: Tensor, v: Tensor, p: float) -> Tensor:
    """Sum over slices of ``W_p^p`` between sorted u (L, N) and each of sorted v (B, L, M)."""
    if u.shape[-1] != v.shape[-1]:
        return wasserstein_1d(u, v, p=p).sum(-1)
    gap = v - u
    return (gap.square() if p == 2 else gap.abs().pow(p)).mean(-1).sum(-1)


def _directions(
    pair: CloudPair,
    num_projections: int,
    projections: Tensor | None,
    kind: Directions,
    generator: torch.Generator | None,
) -> Tensor:
    """(L, d) or (B, L, d); on a line one direction is enough."""
    batch, dim = len(pair.x), pair.x.shape[-1]
    if projections is not None:
        return _check_projections(projections, batch, dim).to(pair.x)
    sample_directions(num_projections, 1, kind=kind)  # checks both
    options = {"kind": kind, "generator": generator, "device": pair.x.device, "dtype": pair.x.dtype}
    return sample_directions(1 if dim == 1 else num_projections, dim, **options)


def _check_projections(projections: Tensor, batch: int, dim: int) -> Tensor:
    check_cloud(projections, "projections")
    if projections.shape[-1] != dim or (projections.ndim == 3 and len(projections) != batch):
        wanted = f"(L, {dim}) or ({batch}, L, {dim})"
        raise ValueError(f"`projections` must have shape {wanted}, got {tuple(projections.shape)}")
    return projections


def _check_options(p: float, reduction: str, backend: str, chunk_size: int | None, pairwise: bool) -> None:
    check_order(p)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if backend not in _BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be None or a whole number >= 1, got {chunk_size!r}")
    if pairwise and reduction == "slices":
        raise ValueError("`pairwise` goes with `reduction` 'none' or 'mean'")
