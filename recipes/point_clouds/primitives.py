"""Triangle meshes of simple solids, from which shapes are put together. y is up."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from trimtab.assets import asset_path

__all__ = ["Mesh", "box", "join", "lathe", "rod", "silhouette", "superellipsoid", "torus"]


class Mesh(NamedTuple):
    """Vertices (V, 3) float64 and faces (F, 3) int64."""

    vertices: np.ndarray
    faces: np.ndarray

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Mesh:
        """Shifted."""
        return self._replace(vertices=self.vertices + (x, y, z))

    def scaled(self, x: float = 1.0, y: float = 1.0, z: float = 1.0) -> Mesh:
        """Scaled about the origin."""
        return self._replace(vertices=self.vertices * (x, y, z))

    def turned(self, axis: str, degrees: float) -> Mesh:
        """Turned about the axis ``"x"``, ``"y"`` or ``"z"``."""
        angle, i = np.radians(degrees), "xyz".index(axis)
        j, k = (i + 1) % 3, (i + 2) % 3
        matrix = np.eye(3)
        matrix[[j, j, k, k], [j, k, j, k]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        return self._replace(vertices=self.vertices @ matrix.T)


def join(parts: Iterable[Mesh]) -> Mesh:
    """Parts as one mesh."""
    parts = list(parts)
    starts = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    faces = [part.faces + start for part, start in zip(parts, starts, strict=True)]
    return Mesh(np.concatenate([part.vertices for part in parts]), np.concatenate(faces))


def box(width: float, height: float, depth: float) -> Mesh:
    """A box on the ground, centred in x and z."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (0.0, 1.0) for z in (-0.5, 0.5)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Mesh(corners * (width, height, depth), np.array(faces))


def lathe(profile: Sequence[tuple[float, float]], segments: int = 32) -> Mesh:
    """The surface that a line of (radius, height) sweeps about the vertical axis."""
    radii, heights = np.array(profile, float).T
    angles = np.linspace(0.0, 2.0 * np.pi, segments, endpoint=False)
    rings = [radii[:, None] * np.cos(angles), np.repeat(heights[:, None], segments, 1), radii[:, None] * np.sin(angles)]
    return Mesh(np.stack(rings, -1).reshape(-1, 3), _grid_faces(len(radii), segments, closed=True))


def rod(start: Sequence[float], end: Sequence[float], radius: float, end_radius: float | None = None) -> Mesh:
    """A round bar, or a cone, between two points."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    along = end - start
    length = float(np.linalg.norm(along))
    mesh = lathe([(0, 0), (radius, 0), (radius if end_radius is None else end_radius, length), (0, length)], 16)
    up = along / length
    side = np.cross(up, (0.0, 0.0, 1.0) if abs(up[2]) < 0.9 else (1.0, 0.0, 0.0))
    side /= np.linalg.norm(side)
    return Mesh(mesh.vertices @ np.stack([side, up, np.cross(side, up)]) + start, mesh.faces)


def superellipsoid(width: float, height: float, depth: float, roundness: tuple[float, float] = (1.0, 1.0)) -> Mesh:
    """A superquadric on the ground: exponents (vertical, horizontal) of 1 are an ellipsoid, near 0 a box."""
    north, east = (np.linspace(-s, s, n) for s, n in ((np.pi / 2, 25), (np.pi, 33)))
    c, s = (_power(f(north), roundness[0])[:, None] for f in (np.cos, np.sin))
    x, z = (c * _power(f(east), roundness[1]) for f in (np.cos, np.sin))
    points = np.stack([x * width / 2, (s + 1) * height / 2 + 0 * x, z * depth / 2], -1)
    return Mesh(points.reshape(-1, 3), _grid_faces(25, 33, closed=False))


def torus(radius: float, thickness: float, roundness: float = 1.0, arc: float = 360.0) -> Mesh:
    """A ring, or a part of one, in the x-y plane about the origin; ``thickness`` is the tube's radius."""
    around, about = np.linspace(0, np.radians(arc), 41), np.linspace(-np.pi, np.pi, 17)
    c, s = (_power(f(about), roundness) * thickness for f in (np.cos, np.sin))
    reach = radius + c
    points = [np.cos(around)[:, None] * reach, np.sin(around)[:, None] * reach, np.ones((41, 1)) * s]
    return Mesh(np.stack(points, -1).reshape(-1, 3), _grid_faces(41, 17, closed=False))


@functools.lru_cache
def silhouette(sprite: str, depth: float) -> Mesh:
    """An emoji's outline as a slab of height 1 in the x-y plane, centred.

    Args:
        sprite: name of the emoji's picture without its ending.
        depth: thickness of the slab.
    """
    with Image.open(asset_path(f"emoji-sprites/{sprite}.png")) as image:
        inside = np.asarray(image.convert("RGBA").resize((40, 40)))[::-1, :, 3] > 128  # row 0 is the lowest
    inside = np.pad(inside, 1)
    rows, columns = np.nonzero(inside)
    quads = []
    for z in (-0.5, 0.5):
        quads += [
            [(c, r, z), (c + 1, r, z), (c + 1, r + 1, z), (c, r + 1, z)] for r, c in zip(rows, columns, strict=True)
        ]
    for r, c in zip(rows, columns, strict=True):
        edges = {
            (-1, 0): ((0, 0), (1, 0)),
            (1, 0): ((0, 1), (1, 1)),
            (0, -1): ((0, 0), (0, 1)),
            (0, 1): ((1, 0), (1, 1)),
        }
        for (dr, dc), ((x0, y0), (x1, y1)) in edges.items():
            if not inside[r + dr, c + dc]:
                a, b = (c + x0, r + y0), (c + x1, r + y1)
                quads.append([(*a, -0.5), (*b, -0.5), (*b, 0.5), (*a, 0.5)])
    corners = np.array(quads, float).reshape(-1, 3)
    height = float(np.ptp(corners[:, 1]))
    corners[:, :2] = (corners[:, :2] - (corners[:, :2].max(0) + corners[:, :2].min(0)) / 2) / height
    corners[:, 2] *= depth
    first = np.arange(0, len(corners), 4)[:, None]
    return Mesh(corners, np.concatenate([first + (0, 1, 2), first + (0, 2, 3)]))


def _grid_faces(rows: int, columns: int, *, closed: bool) -> np.ndarray:
    """Triangles between neighbouring points of a grid whose last column may meet the first."""
    r, c = np.meshgrid(np.arange(rows - 1), np.arange(columns if closed else columns - 1), indexing="ij")
    a, b = r * columns + c, r * columns + (c + 1) % columns
    quads = np.stack([a, b, b + columns, a + columns], -1).reshape(-1, 4)
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def _power(value: np.ndarray, exponent: float) -> np.ndarray:
    return np.sign(value) * np.abs(value) ** exponent
