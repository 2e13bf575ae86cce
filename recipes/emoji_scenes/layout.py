"""Random scenes: which objects, how large and where.

Places are drawn on a grid of 16 units (``grid``) of a canvas of 128: the side of the patches in which the bundled
transformer reads a picture of 128 pixels (8 pixels a latent, 2 latents a patch). An object then has the same patches
wherever it lies, and a small model learns it from fewer pictures. ``grid=1`` gives every place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .captions import SceneFacts
from .scene import CANVAS, Scene, SceneObject
from .vocabulary import BACKGROUNDS, OBJECTS

CATEGORIES = ("one", "count", "left_right", "above_below")
_NAMES = tuple(OBJECTS)
_GROUNDS = tuple(BACKGROUNDS)
_HALF = CANVAS // 2


def sample_facts(rng: np.random.Generator, category: str | None = None, held_out: bool | None = None) -> SceneFacts:
    """Random facts of a scene.

    Args:
        rng: source of randomness.
        category: one of :data:`CATEGORIES`; None draws one object in 35 of 100 scenes, a count in 25, left/right
            and above/below in 20 each.
        held_out: True for facts that training never sees, False for facts of training, None for any.

    Raises:
        ValueError: ``category`` is unknown.
    """
    if category is None:
        category = CATEGORIES[int(np.searchsorted((0.35, 0.6, 0.8), rng.random(), side="right"))]
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}, got {category!r}")
    while True:
        facts = _draw_facts(rng, category)
        if held_out is None or facts.is_held_out() == held_out:
            return facts


def sample_scene(
    rng: np.random.Generator,
    facts: SceneFacts | None = None,
    *,
    category: str | None = None,
    held_out: bool | None = None,
    grid: int = 16,
) -> Scene:
    """A random scene that shows ``facts``, or random facts where none are given (see :func:`sample_facts`).

    >>> scene = sample_scene(np.random.default_rng(0), SceneFacts(("owl",), 3, None, "pink"))
    >>> scene.caption
    'three owls on a pink background'
    """
    if facts is None:
        facts = sample_facts(rng, category, held_out)
    names = facts.objects if facts.relation is not None else facts.objects * facts.count
    slots, sizes = _slots(rng, facts)
    alike = facts.relation is None
    drawn = [int(rng.choice(sizes))] * len(names) if alike else [int(rng.choice(sizes)) for _ in names]
    boxes = [_place(rng, slot, size, grid) for slot, size in zip(slots, drawn, strict=True)]
    objects = tuple(SceneObject(name, box) for name, box in zip(names, boxes, strict=True))
    return Scene(objects, facts.background, float(rng.uniform(-0.06, 0.06)))


def _draw_facts(rng: np.random.Generator, category: str) -> SceneFacts:
    background = _GROUNDS[rng.integers(len(_GROUNDS))]
    first, second = (_NAMES[index] for index in rng.choice(len(_NAMES), 2, replace=False))
    if category == "one":
        return SceneFacts((first,), 1, None, background)
    if category == "count":
        return SceneFacts((first,), int(rng.integers(2, 5)), None, background)
    relations = ("left", "right") if category == "left_right" else ("above", "below")
    return SceneFacts((first, second), 1, relations[rng.integers(2)], background)


Slot = tuple[int, int, int, int]
"""Left, top, right and bottom of the region in which a box may lie."""


def _slots(rng: np.random.Generator, facts: SceneFacts) -> tuple[list[Slot], Sequence[int]]:
    """A region for each object and the sizes to choose from; regions of different objects never overlap."""
    if facts.relation is not None:
        first = {"left": (0, 1), "right": (1, 0), "above": (0, 1), "below": (1, 0)}[facts.relation]
        band = [_column(side) if facts.relation in ("left", "right") else _row(side) for side in first]
        return band, (48, 56)
    if facts.count == 1:
        return [(12, 12, CANVAS - 12, CANVAS - 12)], (56, 64)
    if facts.count == 2:
        band = _column if rng.random() < 0.5 else _row
        return [band(0), band(1)], (48, 56)
    if facts.count == 3:
        alone = (32, 96)
        rows = [[(0, 64), (64, 128)], [alone]]
        if rng.random() < 0.5:
            rows.reverse()
        return [(left, 64 * y, right, 64 * y + 64) for y, row in enumerate(rows) for left, right in row], (48,)
    return [(64 * x, 64 * y, 64 * x + 64, 64 * y + 64) for y in range(2) for x in range(2)], (48,)


def _column(side: int) -> Slot:
    return side * _HALF, 24, side * _HALF + _HALF, CANVAS - 24


def _row(side: int) -> Slot:
    return 24, side * _HALF, CANVAS - 24, side * _HALF + _HALF


def _place(rng: np.random.Generator, slot: Slot, size: int, grid: int) -> tuple[int, int, int]:
    left, top, right, bottom = slot
    return _coordinate(rng, left, right - size, grid), _coordinate(rng, top, bottom - size, grid), size


def _coordinate(rng: np.random.Generator, low: int, high: int, grid: int) -> int:
    first, last = -(-low // grid), high // grid
    return int(rng.integers(first, last + 1)) * grid
