"""What every distance takes: clouds, their weights, and the checks of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CloudPair", "check_cloud", "check_number", "check_pair", "safe_root"]


@dataclass(frozen=True)
class CloudPair:
    """Two batches of clouds ready for computing.

    Attributes:
        x: (B, N, d) float32 or float64.
        y: (B, M, d) likewise.
        x_weights: (B, N) float64, each row of sum one; None for equal weights.
        y_weights: (B, M) likewise.
        batched: whether the caller gave a batch; if not, the result loses its first axis.
        dtype: of the result.
    """

    x: Tensor
    y: Tensor
    x_weights: Tensor | None
    y_weights: Tensor | None
    batched: bool
    dtype: torch.dtype

    def result(self, value: Tensor) -> Tensor:
        """A value a cloud in the caller's dtype, without the batch axis where the caller had none."""
        return (value if self.batched else value[0]).to(self.dtype)


def check_cloud(cloud: Tensor, name: str, *, weights: Tensor | None = None, finite: bool = True) -> None:
    """Refuses what is no cloud.

    Args:
        cloud: (N, d) or (B, N, d), floating point, not empty, finite wherever its weight is not zero.
        name: of the argument, for the message.
        weights: (N,) or (B, N); None for equal weights.
        finite: whether to look at the values.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong number of axes, no point, no coordinate, or a value that is NaN or infinite.
    """
    if not isinstance(cloud, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor of points (N, d) or (B, N, d), got {type(cloud).__name__}")
    if not cloud.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype (float16 to float64), got {cloud.dtype}")
    if cloud.ndim not in (2, 3):
        raise ValueError(f"`{name}` must have shape (N, d) or (B, N, d), got {tuple(cloud.shape)}")
    if 0 in cloud.shape:
        raise ValueError(f"`{name}` must have at least one cloud, point and coordinate, got {tuple(cloud.shape)}")
    if finite:
        good = torch.isfinite(cloud)
        if weights is not None:
            good = good | (weights == 0)[..., None]
        if not good.all():
            raise ValueError(f"`{name}` must be finite, got {int((~good).sum())} values that are NaN or infinite")


def check_pair(
    x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None, *, pairwise: bool = False
) -> CloudPair:
    """Checks two (batches of) clouds against each other and brings them to one form.

    Half precision is computed in float32. Points of weight zero are moved to the origin, so padding may hold anything.

    Args:
        x: (B, N, d) or (N, d).
        y: (B, M, d) or (M, d), on the device of ``x``.
        x_weights: (B, N) or (N,), a mask (bool) or weights >= 0; None for equal weights.
        y_weights: likewise for ``y``.
        pairwise: whether the batches may differ.

    Raises:
        TypeError: clouds or weights are of a wrong type.
        ValueError: shapes that do not fit, devices that differ, values that are not finite, weights that are
            negative, sum to zero or want a gradient.
    """
    for cloud, weights, name in ((x, x_weights, "x"), (y, y_weights, "y")):
        check_cloud(cloud, name, finite=False)
        if weights is not None:
            _check_weights(weights, cloud, f"{name}_weights")
        check_cloud(cloud, name, weights=weights)
    if x.ndim != y.ndim:
        raise ValueError(f"`x` and `y` must both be (N, d) or both (B, N, d), got {tuple(x.shape)}, {tuple(y.shape)}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"`x` and `y` must have the same dimension d, got {x.shape[-1]} and {y.shape[-1]}")
    if x.ndim == 3 and not pairwise and len(x) != len(y):
        raise ValueError(f"`x` and `y` must have as many clouds, got batches of {len(x)} and {len(y)}")
    if x.device != y.device:
        raise ValueError(f"`x` and `y` must be on one device, got {x.device} and {y.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    batched = x.ndim == 3
    ready = []
    for cloud, weights in ((x, x_weights), (y, y_weights)):
        cloud = cloud.to(compute) if batched else cloud.to(compute)[None]
        if weights is not None:
            weights = weights if batched else weights[None]
            cloud = torch.where((weights != 0)[..., None], cloud, 0.0)
            weights = weights.double() / weights.double().sum(-1, keepdim=True)
            if (weights == weights[:, :1]).all():
                weights = None
        ready.append((cloud, weights))
    (x, x_weights), (y, y_weights) = ready
    return CloudPair(x, y, x_weights, y_weights, batched, dtype)


def _check_weights(weights: Tensor, cloud: Tensor, name: str) -> None:
    if not isinstance(weights, Tensor) or not (weights.is_floating_point() or weights.dtype is torch.bool):
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"`{name}` must be a tensor of bool (a mask) or floating point, got {got}")
    if weights.shape != cloud.shape[:-1]:
        raise ValueError(f"`{name}` must have shape {tuple(cloud.shape[:-1])}, got {tuple(weights.shape)}")
    if weights.requires_grad:
        raise ValueError(f"`{name}` must not require a gradient: the distances are differentiable in the points only")
    if weights.device != cloud.device:
        raise ValueError(f"`{name}` must be on the clouds' device {cloud.device}, got {weights.device}")
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and (weights.sum(-1) > 0).all()):
        raise ValueError(f"`{name}` must be finite and >= 0, with a sum > 0 in each cloud")


def check_number(value: float, name: str, good: Callable[[float], bool], takes: str) -> None:
    """Refuses a number that is not ``good``; ``takes`` says in words which are.

    Raises:
        TypeError: not a number.
        ValueError: not in range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be {takes}, got {value!r}")
    if not good(value):
        raise ValueError(f"`{name}` must be {takes}, got {value!r}")


def safe_root(value: Tensor, p: float) -> Tensor:
    """``value ** (1 / p)`` whose gradient at zero is zero instead of infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0) ** (1.0 / p), 0.0)
