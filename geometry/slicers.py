"""Networks that predict, for a pair of clouds, the direction to slice along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .clouds import check_pair

__all__ = ["SLICERS", "AmortizedSlicer", "SlicerKind"]

SlicerKind = Literal[
    "linear", "generalized_linear", "non_linear", "attention", "efficient_attention", "linear_attention"
]
_TINY = 1e-12


class AmortizedSlicer(ModelMixin, ConfigMixin):
    r"""``a_psi(X, Y)``, a unit vector for each pair of clouds (arXiv 2301.04791, section 3).

    ``linear``: :math:`z = W^\top [X; Y] + b`, a weight a point. ``generalized_linear``: the same after an MLP a point.
    ``non_linear``: the MLP after it. ``attention``: :math:`z = (h(X) + h(Y)) / 2` where h is one head of self-attention
    averaged over the points. ``efficient_attention`` normalises queries over features and keys over points, for
    O(N) memory (Shen et al. 2021); ``linear_attention`` projects keys and values to a fixed number of points
    (Linformer, Wang et al. 2020). The two attentions without such a projection do not depend on the order of points,
    nor on which cloud comes first, and take clouds of any size; the other four have a weight a point and take
    ``num_points`` only, the paper's best row, ``linear_attention``, among them.

    Args:
        kind: one of the above.
        dim: d, coordinates a point.
        num_points: N; needed by the kinds with a weight a point.
        key_dim: width of queries and keys.
        projected_points: of ``linear_attention``.

    Raises:
        ValueError: an unknown kind, or ``num_points`` missing where it is needed.

    Example:
        >>> slicer = AmortizedSlicer()
        >>> x, y = torch.randn(2, 50, 3), torch.randn(2, 70, 3)
        >>> slicer(x, y).norm(dim=1).round(decimals=4).tolist()
        [1.0, 1.0]
    """

    @register_to_config
    def __init__(
        self,
        kind: SlicerKind = "efficient_attention",
        dim: int = 3,
        num_points: int | None = None,
        key_dim: int = 64,
        projected_points: int = 64,
    ) -> None:
        super().__init__()
        if kind not in SLICERS:
            raise ValueError(f"`kind` must be one of {', '.join(SLICERS)}, got {kind!r}")
        if num_points is None and kind not in ("attention", "efficient_attention"):
            raise ValueError(f"`num_points` must be given: a {kind} slicer has a weight for each point")
        self.network = SLICERS[kind](dim, num_points, key_dim, projected_points)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The directions.

        Args:
            x: (B, N, d) floating point.
            y: (B, M, d); as many points where the kind has a weight a point.

        Returns:
            (B, d) of unit length; the first axis where the network's output vanishes.

        Raises:
            TypeError, ValueError: as :func:`~trimtab.geometry.sliced_wasserstein`, or for a number of points or
                coordinates other than the slicer's.
        """
        pair = check_pair(x, y)
        if pair.x.shape[-1] != self.config.dim:
            raise ValueError(f"`x` and `y` must have the slicer's dimension {self.config.dim}, got {pair.x.shape[-1]}")
        expected = self.config.num_points
        if expected is not None and (pair.x.shape[1], pair.y.shape[1]) != (expected, expected):
            got = f"{pair.x.shape[1]} and {pair.y.shape[1]}"
            raise ValueError(f"`x` and `y` must have the slicer's number of points {expected}, got {got}")
        raw = self.network(pair.x.to(self.dtype), pair.y.to(self.dtype)).float()
        length = torch.linalg.vector_norm(raw.detach(), dim=-1, keepdim=True)
        axis = torch.eye(raw.shape[-1], device=raw.device)[0]
        raw = torch.where(length > _TINY, raw, axis)
        return pair.result(raw / torch.linalg.vector_norm(raw, dim=-1, keepdim=True))


class _Linear(nn.Module):
    """A weight a point: ``[X; Y]`` of 2 N points to one vector."""

    def __init__(self, dim: int, num_points: int, *_: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(2 * num_points, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.weigh(torch.cat([x, y], dim=1).mT)[..., 0]


class _GeneralizedLinear(_Linear):
    def __init__(self, dim: int, num_points: int, *_: int) -> None:
        super().__init__(dim, num_points)
        self.point = _perceptron(dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.point(x), self.point(y))


class _NonLinear(_Linear):
    def __init__(self, dim: int, num_points: int, *_: int) -> None:
        super().__init__(dim, num_points)
        self.vector = _perceptron(dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.vector(super().forward(x, y))


class _Attention(nn.Module):
    """``softmax(q k' / sqrt(d_k)) v``, averaged over the points."""

    def __init__(self, dim: int, num_points: int | None, key_dim: int, *_: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, key_dim)
        self.to_k = nn.Linear(dim, key_dim)
        self.to_v = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (self.pooled(x) + self.pooled(y))

    def pooled(self, points: Tensor) -> Tensor:
        q, k, v = self.to_q(points), self.to_k(points), self.to_v(points)
        return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)


class _EfficientAttention(_Attention):
    """``softmax_features(q) (softmax_points(k)' v)``, averaged over the points."""

    def pooled(self, points: Tensor) -> Tensor:
        q = self.to_q(points).softmax(-1)
        bias, weight = (t.expand(len(points), -1, -1) for t in (self.to_k.bias[:, None], self.to_k.weight))
        k = torch.baddbmm(bias, weight, points.mT).softmax(-1)  # (B, key_dim, N): along rows it is faster
        v = self.to_v(k @ points)  # weights that sum to one, so the layer may come after them
        return (q.mean(1, keepdim=True) @ v)[:, 0]


class _LinearAttention(_Attention):
    def __init__(self, dim: int, num_points: int, key_dim: int, projected_points: int) -> None:
        super().__init__(dim, num_points, key_dim)
        self.project_k = nn.Linear(num_points, projected_points, bias=False)
        self.project_v = nn.Linear(num_points, projected_points, bias=False)
        for layer in (self.project_k, self.project_v):
            nn.init.xavier_normal_(layer.weight)

    def pooled(self, points: Tensor) -> Tensor:
        q = self.to_q(points)
        k, v = self.project_k(self.to_k(points).mT).mT, self.project_v(self.to_v(points).mT).mT
        return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)


def _perceptron(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid(), nn.Linear(dim, dim))


SLICERS: dict[str, Callable[..., nn.Module]] = {
    "linear": _Linear,
    "generalized_linear": _GeneralizedLinear,
    "non_linear": _NonLinear,
    "attention": _Attention,
    "efficient_attention": _EfficientAttention,
    "linear_attention": _LinearAttention,
}
"""The networks by kind."""
