"""Points on the surface of triangle meshes."""

from __future__ import annotations

import numpy as np

__all__ = ["sample_surface"]


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, generator: np.random.Generator
) -> np.ndarray:
    """Points uniform on a mesh by area.

    Args:
        vertices: (V, 3) floating point, finite.
        faces: (F, 3) whole numbers below V.
        num_points: how many.
        generator: of the random numbers.

    Returns:
        (num_points, 3) float32.

    Raises:
        ValueError: no face, a face of vertices that are not there, no area, or values that are not finite.

    Example:
        >>> square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]])
        >>> points = sample_surface(square, np.array([[0, 1, 2], [0, 2, 3]]), 1000, np.random.default_rng(0))
        >>> points.mean(0).round(1).tolist()
        [0.5, 0.5, 0.0]
    """
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
        raise ValueError(f"`faces` must be (F, 3) with at least one face, got {faces.shape}")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"`faces` must be vertices 0 to {len(vertices) - 1}, got {faces.min()} to {faces.max()}")
    if not np.isfinite(vertices).all():
        raise ValueError("`vertices` must be finite, got NaN or infinite coordinates")
    corners = np.asarray(vertices, np.float64)[faces]
    edges = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    total = area.cumsum()
    if not 0 < total[-1] < np.inf:
        raise ValueError(f"`faces` must have an area > 0 and finite, got {total[-1] / 2}")
    chosen = np.searchsorted(total, generator.random(num_points) * total[-1], side="right").clip(max=len(faces) - 1)
    u, v = generator.random((2, num_points, 1))
    outside = u + v > 1.0
    u, v = np.where(outside, 1.0 - u, u), np.where(outside, 1.0 - v, v)
    return (corners[chosen, 0] + u * edges[chosen, 0] + v * edges[chosen, 1]).astype(np.float32)
