"""Pictures of point clouds: shaded discs with occlusion, and turntables, with nothing but numpy and Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .clouds import check_cloud

__all__ = ["render_point_cloud", "save_turntable", "turntable"]

_SMOOTHING = 2  # drawn so many times as large, then scaled down
_LOW, _HIGH = np.array([38, 84, 160.0]), np.array([246, 178, 60.0])


def render_point_cloud(
    cloud: Tensor | np.ndarray,
    *,
    size: int = 320,
    azimuth: float = 35.0,
    elevation: float = 20.0,
    point_radius: float | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Draws a cloud as discs, nearer ones over farther ones and lighter, coloured by height.

    Args:
        cloud: (N, 3), finite; y is up. It is drawn at its own scale: unit radius fills the picture.
        size: width and height in pixels.
        azimuth: of the camera about the vertical axis, in degrees.
        elevation: of the camera above the ground, in degrees.
        point_radius: of the discs in pixels; None suits the number of points.
        background: RGB, 0 to 255.

    Returns:
        An RGB picture.

    Raises:
        TypeError, ValueError: not such a cloud, or a size below 16.
    """
    points = torch.as_tensor(cloud).detach().float().cpu()
    check_cloud(points, "cloud")
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"`cloud` must have shape (N, 3), got {tuple(points.shape)}")
    if size < 16:
        raise ValueError(f"`size` must be at least 16 pixels, got {size}")
    camera = points.numpy() @ _rotation(azimuth, elevation).T
    pixels = size * _SMOOTHING
    radius = point_radius or max(0.9, 0.35 * size / math.sqrt(len(points)))
    offsets = _disc(radius * _SMOOTHING)
    depth = 2.6 / (2.6 - camera[:, 2].clip(-2.0, 2.0))  # a mild perspective
    x = (0.5 + 0.44 * camera[:, 0] * depth) * pixels
    y = (0.5 - 0.44 * camera[:, 1] * depth) * pixels
    place = np.stack([y, x], axis=1).astype(int)[:, None] + offsets
    order = camera[:, 2].argsort(kind="stable")  # the last one written stays
    inside = ((place >= 0) & (place < pixels)).all(-1)[order]
    colours = np.repeat(_shade(points.numpy(), camera[:, 2])[order, None], len(offsets), axis=1)
    canvas = np.empty((pixels, pixels, 3), np.uint8)
    canvas[:] = background
    target = place[order][inside]
    canvas[target[:, 0], target[:, 1]] = colours[inside]
    return Image.fromarray(canvas).resize((size, size), Image.Resampling.BOX)


def turntable(
    cloud: Tensor | np.ndarray, *, num_frames: int = 24, size: int = 320, elevation: float = 20.0
) -> list[Image.Image]:
    """Pictures of a cloud from all around.

    Args:
        cloud: (N, 3), finite.
        num_frames: how many, >= 1.
        size: in pixels.
        elevation: of the camera, in degrees.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}")
    angles = [35.0 + 360.0 * frame / num_frames for frame in range(num_frames)]
    return [render_point_cloud(cloud, size=size, azimuth=angle, elevation=elevation) for angle in angles]


def save_turntable(frames: Sequence[Image.Image], path: str | os.PathLike[str], *, seconds: float = 3.0) -> None:
    """Writes frames as one file, under a temporary name first.

    Args:
        frames: of one size, at least one.
        path: ends in ``.gif`` (they move, endlessly) or ``.png`` (they lie side by side, at most eight of them).
        seconds: of one turn.

    Raises:
        ValueError: no frame, or another ending.
    """
    path = Path(path).expanduser()
    if not frames:
        raise ValueError("`frames` must hold at least one picture, got none")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix.lower() == ".gif":
            first, *others = (frame.quantize(64) for frame in frames)
            pause = round(1000 * seconds / len(frames))
            first.save(temporary, save_all=True, append_images=others, duration=pause, loop=0)
        elif path.suffix.lower() == ".png":
            _strip(frames).save(temporary)
        else:
            raise ValueError(f"`path` must end in .gif or .png, got {path.name!r}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    chosen = frames[:: max(1, math.ceil(len(frames) / 8))]
    width, height = chosen[0].size
    strip = Image.new("RGB", (width * len(chosen), height))
    for index, frame in enumerate(chosen):
        strip.paste(frame, (index * width, 0))
    return strip


def _rotation(azimuth: float, elevation: float) -> np.ndarray:
    a, e = math.radians(azimuth), math.radians(elevation)
    turn = np.array([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, math.cos(e), -math.sin(e)], [0, math.sin(e), math.cos(e)]])
    return tilt @ turn


def _disc(radius: float) -> np.ndarray:
    reach = math.ceil(radius)
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    return grid[(grid**2).sum(1) <= radius**2]


def _shade(points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    height = (points[:, 1] - points[:, 1].min()) / max(float(np.ptp(points[:, 1])), 1e-6)
    near = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-6)
    colour = _LOW + (_HIGH - _LOW) * height[:, None]
    return (colour * (0.55 + 0.45 * near[:, None])).clip(0, 255).astype(np.uint8)
