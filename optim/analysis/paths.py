"""The loss between two solutions: weights of two finetunes, or two noises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_scalar

__all__ = ["PathResult", "interpolate_loss"]

Point = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class PathResult:
    """The loss along a path.

    Attributes:
        t: (num_points,) float64 from 0 to 1.
        loss: (num_points,) float64.
        barrier: max_t loss(t) - ((1 - t) loss(0) + t loss(1)), >= 0: what lies between the two in the way.
        worst: the t of that.
    """

    t: Tensor
    loss: Tensor
    barrier: float
    worst: float


def interpolate_loss(
    closure_at: Callable[[Any], Tensor | float],
    w_a: Point,
    w_b: Point,
    num_points: int = 25,
    *,
    path: Literal["straight", "spherical"] = "straight",
    callback: Callable[[int, int], Any] | None = None,
) -> PathResult:
    """The loss at points between two solutions, and the barrier between them.

    Two solutions in one flat valley have a barrier of about 0: Sagun, Evci, Guney, Dauphin, Bottou (arXiv 1706.04454,
    section 4).

    Args:
        closure_at: a point to its loss; of weights, ``lambda w: loss(torch.func.functional_call(model, w, inputs))``.
        w_a: a tensor, or tensors by name, such as a ``state_dict``; those that are no floating tensors are taken
            from here.
        w_b: likewise, of the same shapes and names.
        num_points: with both ends, >= 3.
        path: "spherical" turns a tensor's direction at an even speed and its length evenly: Gaussian noise of a
            generator has a typical length, which a straight line leaves. For tensors alone.
        callback: called as (points done, num_points) after each.

    Raises:
        ValueError: points that do not fit, or a loss that is no finite number (which says where).

    Example:
        >>> loss = lambda w: float((w[0] ** 2 - 1) ** 2)
        >>> interpolate_loss(loss, torch.tensor([-1.0]), torch.tensor([1.0])).barrier
        1.0
    """
    checked_count("num_points", num_points, 3)
    checked_choice("path", path, ("straight", "spherical"))
    _check_ends(w_a, w_b, path)
    t, losses = torch.linspace(0, 1, num_points, dtype=torch.float64), []
    for done, part in enumerate(t.tolist(), 1):
        with torch.no_grad():
            losses.append(checked_scalar("closure_at", closure_at(_between(w_a, w_b, part, path))))
        if not torch.isfinite(torch.tensor(losses[-1])):
            raise ValueError(f"`closure_at` gives {losses[-1]} at t = {part:g}; takes one that gives finite numbers")
        if callback is not None:
            callback(done, num_points)
    loss = torch.tensor(losses, dtype=torch.float64)
    above = loss - ((1 - t) * loss[0] + t * loss[-1])
    worst = int(above.argmax())
    return PathResult(t, loss, max(0.0, float(above[worst])), float(t[worst]))


def _check_ends(w_a: Point, w_b: Point, path: str) -> None:
    if isinstance(w_a, Mapping) != isinstance(w_b, Mapping):
        raise ValueError("`w_a` and `w_b` are a tensor and tensors by name; takes two of a kind")
    if not isinstance(w_a, Mapping):
        if w_a.shape != w_b.shape:
            raise ValueError(f"`w_b` has shape {tuple(w_b.shape)}; takes that of `w_a`, {tuple(w_a.shape)}")
        return
    if path == "spherical":
        raise ValueError('`path` is "spherical", which is for tensors; takes "straight" for tensors by name')
    if set(w_a) != set(w_b):
        raise ValueError(f"`w_b` differs from `w_a` in {sorted(set(w_a) ^ set(w_b))[:4]}; takes the same names")
    for name, tensor in w_a.items():
        if tensor.shape != w_b[name].shape:
            raise ValueError(f"`w_b` has {name} of shape {tuple(w_b[name].shape)}; takes {tuple(tensor.shape)}")


def _between(a: Point, b: Point, t: float, path: str) -> Point:
    if isinstance(a, Mapping):
        return {name: _straight(tensor, b[name], t) for name, tensor in a.items()}
    return _straight(a, b, t) if path == "straight" else _spherical(a, b, t)


def _straight(a: Tensor, b: Tensor, t: float) -> Tensor:
    return (1 - t) * a.detach() + t * b.detach() if a.is_floating_point() else a


def _spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.detach().double(), b.detach().double()
    lengths = x.norm(), y.norm()
    if not float(min(lengths)):
        raise ValueError("`w_a` or `w_b` is 0, which has no direction")
    angle = torch.acos(((x * y).sum() / (lengths[0] * lengths[1])).clamp(-1, 1))
    if float(angle) < 1e-6 or float(torch.pi - angle) < 1e-6:
        return _straight(a, b, t)
    direction = (torch.sin((1 - t) * angle) * x / lengths[0] + torch.sin(t * angle) * y / lengths[1]) / angle.sin()
    return (direction * ((1 - t) * lengths[0] + t * lengths[1])).to(a.dtype)
