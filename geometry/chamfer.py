"""The chamfer distance without a table of all distances."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .clouds import check_pair

__all__ = ["chamfer_distance"]

_TREE_DIMENSIONS = 10  # above, a KD-tree looks at nearly all points
_TILE_ELEMENTS = 1 << 22


def chamfer_distance(
    x: Tensor,
    y: Tensor,
    *,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    squared: bool = True,
) -> Tensor:
    r"""Mean distance to the nearest point of the other cloud, both directions added.

    :math:`\frac1N \sum_i \min_j |x_i - y_j|^2 + \frac1M \sum_j \min_i |x_i - y_j|^2`, as pytorch3d and kaolin
    define it. Neighbours come from KD-trees on a CPU and from tiles of the distance table elsewhere or where d > 10, so
    memory is O(B (N + M) d).

    Args:
        x: (B, N, d) or (N, d), float16 to float64.
        y: (B, M, d) or (M, d).
        x_weights: (B, N) or (N,), weights of the means or a mask; points of weight zero are nobody's neighbour.
        y_weights: likewise for ``y``.
        squared: whether distances are squared before the mean.

    Returns:
        (B,) or a scalar, differentiable in ``x`` and ``y``.

    Raises:
        TypeError, ValueError: as :func:`~trimtab.geometry.sliced_wasserstein`.

    Example:
        >>> chamfer_distance(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(8.5000)
    """
    pair = check_pair(x, y, x_weights, y_weights)
    with torch.autocast(pair.x.device.type, enabled=False):
        forward = _one_way(pair.x, pair.y, pair.x_weights, pair.y_weights, squared)
        backward = _one_way(pair.y, pair.x, pair.y_weights, pair.x_weights, squared)
    return pair.result(forward + backward)


def _one_way(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, squared: bool) -> Tensor:
    with torch.no_grad():
        on_cpu = x.device.type == "cpu" and x.shape[-1] <= _TREE_DIMENSIONS
        nearest = (_tree_neighbours if on_cpu else _tiled_neighbours)(x.detach(), y.detach(), y_weights)
    gap = x - y.gather(1, nearest[..., None].expand(-1, -1, y.shape[-1]))
    distance = gap.square().sum(-1)
    if not squared:
        apart = distance > 0  # the square root has no slope at zero
        distance = torch.where(apart, torch.where(apart, distance, 1.0).sqrt(), 0.0)
    return distance.mean(-1) if x_weights is None else (distance * x_weights.to(distance.dtype)).sum(-1)


def _tree_neighbours(x: Tensor, y: Tensor, y_weights: Tensor | None) -> Tensor:
    """Index of the nearest point of ``y`` (B, M, d) for each of ``x`` (B, N, d), (B, N)."""
    found = []
    for index, (points, others) in enumerate(zip(x.numpy(), y.numpy(), strict=True)):
        kept = None if y_weights is None else np.flatnonzero(y_weights[index].numpy())
        tree = cKDTree(others if kept is None else others[kept], balanced_tree=False, compact_nodes=False)
        nearest = tree.query(points, workers=torch.get_num_threads())[1]
        found.append(torch.from_numpy(np.asarray(nearest if kept is None else kept[nearest], np.int64)))
    return torch.stack(found)


def _tiled_neighbours(x: Tensor, y: Tensor, y_weights: Tensor | None) -> Tensor:
    tile = max(1, _TILE_ELEMENTS // (y.shape[0] * y.shape[1]))
    found = []
    for rows in x.split(tile, dim=1):
        distance = torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")
        if y_weights is not None:
            distance = distance.masked_fill((y_weights == 0)[:, None], torch.inf)
        found.append(distance.argmin(-1))
    return torch.cat(found, dim=1)
