"""Closed convex sets to play in: projections, diameters, and lowest values of linear functions."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number, checked_point

__all__ = ["Ball", "Box", "Domain", "Simplex"]


class Domain(ABC):
    """A bounded closed convex set of tensors of one shape.

    Attributes:
        shape: of its points.
        diameter: the largest Euclidean distance of two of them.
    """

    shape: tuple[int, ...]
    diameter: float

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set, shaped as x."""

    @abstractmethod
    def start(self) -> Tensor:
        """A point in its middle, float64."""

    @abstractmethod
    def lowest(self, gradient: Tensor) -> Tensor:
        """min over the set of <gradient, x>, a scalar."""


class Ball(Domain):
    """{x : ||x - center|| <= radius}.

    Args:
        radius: > 0.
        center: a floating tensor, of any shape.

    Raises:
        ValueError: for a radius out of range.

    Example:
        >>> Ball(1.0, torch.zeros(2)).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def __init__(self, radius: float, center: Tensor) -> None:
        self.radius = checked_number("radius", radius, above=0)
        self.center = checked_point("center", center).double()
        self.shape, self.diameter = tuple(center.shape), 2 * self.radius

    def project(self, x: Tensor) -> Tensor:
        """See `Domain`."""
        center = self.center.to(x)
        away = x - center
        return center + away * (self.radius / torch.linalg.vector_norm(away).clamp_min(self.radius))

    def start(self) -> Tensor:
        """Its centre."""
        return self.center.clone()

    def lowest(self, gradient: Tensor) -> Tensor:
        """See `Domain`."""
        return (self.center.to(gradient) * gradient).sum() - self.radius * torch.linalg.vector_norm(gradient)


class Box(Domain):
    """{x : low <= x <= high}.

    Args:
        low: a floating tensor, of any shape.
        high: of the same shape.

    Raises:
        ValueError: if the shapes differ or a bound is above the other.

    Example:
        >>> Box(torch.zeros(2), torch.ones(2)).project(torch.tensor([-1.0, 0.5]))
        tensor([0.0000, 0.5000])
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = checked_point("low", low).double(), checked_point("high", high).double()
        if low.shape != high.shape or bool((low > high).any()):
            got = f"shapes {tuple(low.shape)} and {tuple(high.shape)}" if low.shape != high.shape else "low > high"
            raise ValueError(f"`low` and `high` have {got}; takes low <= high of one shape")
        self.shape, self.diameter = tuple(low.shape), float(torch.linalg.vector_norm(self.high - self.low))

    def project(self, x: Tensor) -> Tensor:
        """See `Domain`."""
        return x.clamp(self.low.to(x), self.high.to(x))

    def start(self) -> Tensor:
        """Its centre."""
        return (self.low + self.high) / 2

    def lowest(self, gradient: Tensor) -> Tensor:
        """See `Domain`."""
        return torch.minimum(self.low.to(gradient) * gradient, self.high.to(gradient) * gradient).sum()


class Simplex(Domain):
    """{w (n,) : w >= 0, sum w = 1}.

    Args:
        n: >= 2.

    Raises:
        ValueError: for another n.

    Example:
        >>> Simplex(2).project(torch.tensor([1.0, 0.5]))
        tensor([0.7500, 0.2500])
    """

    def __init__(self, n: int) -> None:
        self.n = checked_count("n", n, 2)
        self.shape, self.diameter = (n,), 2**0.5

    def project(self, x: Tensor) -> Tensor:
        """See `Domain`; by sorting (Held, Wolfe, Crowder, 1974)."""
        ordered = x.sort(descending=True).values
        excess = ordered.cumsum(0) - 1
        count = (ordered * torch.arange(1, self.n + 1, device=x.device) > excess).sum()
        return (x - excess[count - 1] / count).clamp_min(0)

    def start(self) -> Tensor:
        """Equal weights."""
        return torch.full((self.n,), 1 / self.n, dtype=torch.float64)

    def lowest(self, gradient: Tensor) -> Tensor:
        """See `Domain`."""
        return gradient.min()
