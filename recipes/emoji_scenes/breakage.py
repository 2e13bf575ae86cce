"""Pictures of broken objects: doubled, torn, merged with another. A generator makes such; no caption describes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from .scene import CANVAS, Scene, SceneObject, sprite
from .vocabulary import OBJECTS

KINDS = ("doubled", "torn", "stretched", "squeezed", "merged")
_LEAST_CHANGE = 0.03
_TRIES = 8


def break_scene(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> np.ndarray:
    """The picture of ``scene`` with one of its objects broken.

    Args:
        scene: what to show otherwise.
        rng: source of randomness.
        kind: ``"doubled"`` draws the object a second time, shifted by a part of its size; ``"torn"`` takes a part of it
            away, ``"stretched"`` continues it with a part of its shifted copy and ``"merged"`` with a part of another
            object, each along a soft line through it; ``"squeezed"`` changes the ratio of its sides by 1.15 to 1.7.
            None draws one of them.

    Returns:
        float32 (128, 128, 3) in [0, 1]. Inside the object's box it differs from the whole object's picture, and where
        two were put together from both, by at least 0.03 on average where that can be had.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    whole = scene.render()
    for _ in range(_TRIES):
        index = int(rng.integers(len(scene.objects)))
        picture, other = _broken(scene, index, kind or KINDS[rng.integers(len(KINDS))], whole, rng)
        left, top, size = scene.objects[index].box
        box = slice(top, top + size), slice(left, left + size)
        if min(np.abs(picture - image)[box].mean() for image in (whole, other)) >= _LEAST_CHANGE:
            break
    return picture


def _broken(
    scene: Scene, index: int, kind: str, whole: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A broken picture and the other whole one that it must differ from."""
    item = scene.objects[index]
    without = scene.objects[:index] + scene.objects[index + 1 :]
    if kind == "doubled":
        copy = replace(item, box=_shifted(item, rng))
        objects = (copy, *scene.objects) if rng.random() < 0.5 else (*scene.objects, copy)
        return replace(scene, objects=objects).render(), replace(scene, objects=(*without, copy)).render()
    if kind == "squeezed":
        empty = replace(scene, objects=without).render()
        return _squeezed(item, empty, rng), empty
    if kind == "torn":
        objects = without
    elif kind == "stretched":
        objects = (*without, replace(item, box=_shifted(item, rng)))
    else:
        names = [name for name in OBJECTS if name != item.name]
        objects = (*without, SceneObject(str(rng.choice(names)), item.box))
    other = replace(scene, objects=objects).render()
    share = _soft_half(item, rng)
    return share * whole + (1 - share) * other, other


def _shifted(item: SceneObject, rng: np.random.Generator) -> tuple[int, int, int]:
    """The box moved by 10% to 65% of its side, mostly along one axis, inside the canvas."""
    left, top, size = item.box
    angle = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.35)
    length = rng.uniform(0.1, 0.65) * size
    moved = [
        int(np.clip(round(start + length * way), 0, CANVAS - size))
        for start, way in ((left, np.cos(angle)), (top, np.sin(angle)))
    ]
    return *moved, size


def _squeezed(item: SceneObject, canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The object drawn on a picture, wider or higher than it is, about the middle of its box."""
    left, top, size = item.box
    ratio = float(np.exp(rng.uniform(np.log(1.15), np.log(1.7)) * rng.choice([-1, 1])))
    longest = 0.5 + rng.uniform(-0.1, 0.1)  # how much of the change makes the object longer, the rest narrower
    wide, high = (min(CANVAS, max(8, round(size * ratio**power))) for power in (longest, longest - 1))
    colour, alpha = (_resized(part, wide, high) for part in sprite(item.name, size))
    x = int(np.clip(left + (size - wide) // 2, 0, CANVAS - wide))
    y = int(np.clip(top + (size - high) // 2, 0, CANVAS - high))
    patch = canvas[y : y + high, x : x + wide]
    patch *= 1.0 - alpha
    patch += colour
    return np.clip(canvas, 0.0, 1.0, out=canvas)


def _resized(pixels: np.ndarray, wide: int, high: int) -> np.ndarray:
    channels = [Image.fromarray(pixels[..., i]).resize((wide, high)) for i in range(pixels.shape[-1])]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], -1), 0.0, 1.0)


def _soft_half(item: SceneObject, rng: np.random.Generator) -> np.ndarray:
    """Weights (128, 128, 1) that go from 1 to 0 across a line through the object, near its centre."""
    angle, softness = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 6.0)
    normal = np.array([np.cos(angle), np.sin(angle)])
    through = np.array(item.centre) + rng.uniform(-0.25, 0.25) * item.box[2] * normal
    rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
    distance = (columns - through[0]) * normal[0] + (rows - through[1]) * normal[1]
    return (0.5 * (1 + np.tanh(distance / (2 * softness))))[..., None].astype(np.float32)
