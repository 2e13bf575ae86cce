"""Clouds of the shapes: centred, of unit radius, drawn by seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.geometry import normalize_cloud, sample_surface

from .shapes import CLASSES, make_shape

__all__ = ["ShapePool", "draw_cloud"]

_TEST = 1_000_000  # added to the numbers of shapes that are for testing


def draw_cloud(name: str, number: int, num_points: int, *, test: bool = False, seed: int = 0) -> Tensor:
    """A shape's cloud, always the same for the same arguments.

    Args:
        name: class of the shape.
        number: which shape of the class.
        num_points: uniform on its surface.
        test: whether it is one of the shapes that training does not use.
        seed: of all shapes.

    Returns:
        (num_points, 3) float32, its mean at the origin, its largest radius 1.
    """
    index = list(CLASSES).index(name)
    rng = np.random.default_rng([seed, index, number + _TEST * test])
    mesh = make_shape(name, rng)
    return normalize_cloud(torch.from_numpy(sample_surface(mesh.vertices, mesh.faces, num_points, rng)))[0]


class ShapePool:
    """Many shapes as dense clouds in memory, of which each draw takes other points.

    Args:
        classes: names.
        shapes_a_class: how many of each.
        points_a_shape: density of the clouds.
        test: whether shapes are those for testing.
        seed: of all shapes.

    Attributes:
        clouds: (C * shapes_a_class, points_a_shape, 3) float32.
        labels: (C * shapes_a_class,) int64, places in ``classes``.
    """

    def __init__(
        self,
        classes: Sequence[str],
        shapes_a_class: int,
        points_a_shape: int = 4096,
        *,
        test: bool = False,
        seed: int = 0,
    ) -> None:
        self.classes = tuple(classes)
        clouds = [
            draw_cloud(name, number, points_a_shape, test=test, seed=seed)
            for name in self.classes
            for number in range(shapes_a_class)
        ]
        self.clouds = torch.stack(clouds)
        self.labels = torch.arange(len(self.classes)).repeat_interleave(shapes_a_class)

    def draw(self, count: int, num_points: int, generator: torch.Generator) -> Tensor:
        """Random shapes, turned a little about the vertical axis, mirrored at random, (count, num_points, 3)."""
        chosen = torch.randint(len(self.clouds), (count,), generator=generator)
        total = self.clouds.shape[1]
        points = torch.rand(count, total, generator=generator).argsort(1)[:, :num_points]
        clouds = self.clouds[chosen[:, None], points]
        angle = 0.25 * torch.randn(count, generator=generator)
        mirror = 2.0 * torch.randint(2, (count,), generator=generator) - 1.0
        c, s, one, zero = angle.cos(), angle.sin(), torch.ones(count), torch.zeros(count)
        turn = torch.stack([c, zero, -s, zero, one, zero, s, zero, c], 1).reshape(count, 3, 3)
        turn = turn * torch.stack([one, one, mirror], 1)[:, None]
        return normalize_cloud(clouds @ turn.mT)[0]
