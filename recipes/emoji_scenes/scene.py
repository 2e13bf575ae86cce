"""A scene of EmojiScenes: what lies where, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from trimtab.assets import asset_path

from .captions import SceneFacts, write_caption
from .vocabulary import BACKGROUNDS, OBJECTS

CANVAS = 128
"""Width and height of the plane that boxes are given on, whatever size is rendered."""


@dataclass(frozen=True)
class SceneObject:
    """An object and its square box.

    Attributes:
        name: a key of :data:`OBJECTS`, colour included.
        box: left, top and side length, in units of :data:`CANVAS`.
    """

    name: str
    box: tuple[int, int, int]

    @property
    def colour(self) -> str | None:
        """The colour word of a shape, None for an object that has colours of its own."""
        return OBJECTS[self.name].colour

    @property
    def centre(self) -> tuple[float, float]:
        left, top, size = self.box
        return left + size / 2, top + size / 2


@dataclass(frozen=True)
class Scene:
    """A composition of objects on a coloured ground.

    Attributes:
        objects: all of one kind, or two of different kinds, in the order that the caption names them.
        background: a key of :data:`BACKGROUNDS`.
        gradient: how much lighter (in [0, 1] units of colour) the ground is at the bottom than at the middle,
            in [-0.06, 0.06].
    """

    objects: tuple[SceneObject, ...]
    background: str
    gradient: float = 0.0

    @property
    def facts(self) -> SceneFacts:
        names = tuple(item.name for item in self.objects)
        if len(set(names)) == 1:
            return SceneFacts(names[:1], len(names), None, self.background)
        return SceneFacts(names, 1, relation_of(*self.objects), self.background)

    @property
    def caption(self) -> str:
        return write_caption(self.facts)

    def render(self, size: int = CANVAS) -> np.ndarray:
        """The picture as a float32 array (size, size, 3) in [0, 1].

        Args:
            size: pixels of a side, 64 or more.

        Raises:
            ValueError: ``size`` is below 64.
        """
        if size < 64:
            raise ValueError(f"size must be at least 64 pixels, got {size}")
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = background_rows(self.background, self.gradient, size)
        for item in self.objects:
            left, top, side = (round(value * size / CANVAS) for value in item.box)
            colour, alpha = sprite(item.name, side)
            patch = canvas[top : top + side, left : left + side]
            patch *= 1.0 - alpha
            patch += colour
        return np.clip(canvas, 0.0, 1.0, out=canvas)

    def to_image(self, size: int = CANVAS) -> Image.Image:
        """The picture as an RGB image of ``size`` x ``size`` pixels."""
        return Image.fromarray((self.render(size) * 255.0).round().astype(np.uint8))


def relation_of(first: SceneObject, second: SceneObject) -> str:
    """Where ``first`` lies as seen from ``second``: along the axis on which their centres differ most."""
    across = first.centre[0] - second.centre[0]
    down = first.centre[1] - second.centre[1]
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def background_rows(background: str, gradient: float, size: int) -> np.ndarray:
    """Colours of the ground from top to bottom, float32 (size, 1, 3); the caller clips to [0, 1]."""
    colour = np.array(BACKGROUNDS[background], np.float32) / 255.0
    return colour + (np.linspace(-1.0, 1.0, size, dtype=np.float32) * gradient)[:, None, None]


@lru_cache(maxsize=4096)
def sprite(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An object's picture: premultiplied colour (size, size, 3) and alpha (size, size, 1), float32 in [0, 1]."""
    path = asset_path("emoji-sprites") / OBJECTS[name].sprite
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGBA"), np.float32) / 255.0
    pixels[..., :3] *= pixels[..., 3:]
    channels = [
        np.asarray(Image.fromarray(pixels[..., index]).resize((size, size), Image.Resampling.LANCZOS))
        for index in range(4)
    ]
    resized = np.clip(np.stack(channels, -1), 0.0, 1.0)
    resized.flags.writeable = False
    return resized[..., :3], resized[..., 3:]
