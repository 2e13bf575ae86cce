"""Distances by optimal transport in the clouds' own space, through POT: exact, and with entropy."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .clouds import CloudPair, check_number, check_pair, safe_root
from .one_dimensional import check_order

__all__ = ["earth_movers_distance", "sinkhorn_divergence"]


def earth_movers_distance(
    x: Tensor,
    y: Tensor,
    *,
    p: float = 1.0,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    root: bool = False,
) -> Tensor:
    r"""Exact ``W_p^p`` between clouds: the cost of the best matching, a mean over points.

    :math:`\min_\pi \sum_{ij} \pi_{ij} |x_i - y_j|^p`, solved by POT's network simplex on the CPU, cloud by cloud, in
    about O(N^3) time and O(N M) memory. The default p = 1 is the earth mover's distance of point-cloud papers, which
    often give the sum over points instead.

    Args:
        x: (B, N, d) or (N, d), float16 to float64.
        y: (B, M, d) or (M, d).
        p: order, >= 1.
        x_weights: (B, N) or (N,), weights or a mask.
        y_weights: likewise for ``y``.
        root: whether to return the distance ``W_p``.

    Returns:
        (B,) or a scalar, differentiable in ``x`` and ``y`` at the fixed matching (the envelope theorem).

    Raises:
        TypeError, ValueError: as :func:`~trimtab.geometry.sliced_wasserstein`.
        ImportError: POT is not installed.

    Example:
        >>> earth_movers_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]]))
        tensor(1.5000)
    """
    ot = _pot()
    pair = check_pair(x, y, x_weights, y_weights)
    check_order(p)
    costs = []
    for index, (a, b) in enumerate(zip(pair.x, pair.y, strict=True)):
        rows, columns, mass = _matching(ot, pair, index, p)
        gap = a[rows] - b[columns]
        squared = gap.square().sum(-1)
        distance = squared if p == 2 else safe_root(squared, 2.0) if p == 1 else safe_root(squared, 2.0) ** p
        costs.append((distance * mass.to(distance)).sum())
    cost = torch.stack(costs)
    return pair.result(safe_root(cost, p) if root else cost)


def _matching(ot: ModuleType, pair: CloudPair, index: int, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal plan's entries that are not zero: rows, columns and mass."""
    from scipy.spatial.distance import cdist

    a, b = (points[index].detach().double().cpu().numpy() for points in (pair.x, pair.y))
    cost = cdist(a, b, "sqeuclidean") if p == 2 else cdist(a, b) ** p
    weights = [[] if w is None else w[index].cpu().numpy() for w in (pair.x_weights, pair.y_weights)]
    plan = ot.emd(*weights, cost, numItermax=10_000_000)
    rows, columns = np.nonzero(plan)
    found = (torch.from_numpy(part).to(pair.x.device) for part in (rows, columns, plan[rows, columns]))
    return tuple(found)


def sinkhorn_divergence(
    x: Tensor, y: Tensor, *, regularization: float = 1e-2, max_iterations: int = 1000, tolerance: float = 1e-6
) -> Tensor:
    r"""Entropic optimal transport without its bias, for the cost :math:`|x - y|^2`.

    :math:`S_\varepsilon(X, Y) = OT_\varepsilon(X, Y) - \frac12 OT_\varepsilon(X, X) - \frac12 OT_\varepsilon(Y, Y)`
    (Feydy et al. 2019), by Sinkhorn's iteration in the log domain (POT), batched, in O(B N M) memory. It tends to
    ``W_2^2`` as the regularization tends to 0. Equal weights only.

    Args:
        x: (B, N, d) or (N, d), float16 to float64.
        y: (B, M, d) or (M, d).
        regularization: epsilon > 0, in units of squared distance.
        max_iterations: of Sinkhorn.
        tolerance: of the marginals, where the iteration stops.

    Returns:
        (B,) or a scalar, differentiable in ``x`` and ``y`` at the final plans (the envelope theorem).

    Raises:
        TypeError, ValueError: as :func:`~trimtab.geometry.sliced_wasserstein`, and for a regularization not > 0 or
            squared distances that overflow.
        ImportError: POT is not installed.
    """
    ot = _pot()
    pair = check_pair(x, y)
    takes = "a finite number > 0"
    check_number(regularization, "regularization", lambda value: 0 < value < math.inf, takes)
    values = []
    for a, b in ((pair.x, pair.y), (pair.x, pair.x), (pair.y, pair.y)):
        squared = (a[:, :, None] - b[:, None]).square().sum(-1) if a.shape[-1] <= 4 else torch.cdist(a, b).square()
        with torch.no_grad():
            options = {"reg": regularization, "max_iter": max_iterations, "tol": tolerance, "method": "log_sinkhorn"}
            plan = ot.batch.solve_batch(squared.detach(), **options, grad="detach").plan
            independent = math.log(plan.shape[1] * plan.shape[2])
            divergence = torch.special.xlogy(plan, plan).sum((1, 2)) + independent * plan.sum((1, 2))
        values.append((plan * squared).sum((1, 2)) + regularization * divergence)
    between, within_x, within_y = values
    divergence = between - 0.5 * (within_x + within_y)
    if not bool(torch.isfinite(divergence).all()):
        raise ValueError("`x` and `y` must have squared distances that their dtype holds; these overflow")
    return pair.result(divergence)


def _pot() -> ModuleType:
    try:
        import ot
        import ot.batch
    except ImportError:
        raise ImportError("this distance needs POT: pip install 'trimtab[geometry]'") from None
    return ot
