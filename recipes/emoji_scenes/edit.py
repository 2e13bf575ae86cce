"""Edits of scenes: the ground truth that an edit of their pictures is measured against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import combinations

from .captions import SceneFacts
from .scene import CANVAS, Scene, SceneObject
from .vocabulary import BACKGROUNDS, COLOURS, OBJECTS

Box = tuple[int, int, int]
_STEP = 8


def edit(
    scene: Scene,
    *,
    replace: Mapping[str, str] | None = None,
    recolour: Mapping[str, str] | None = None,
    background: str | None = None,
    count: int | None = None,
    mirror: bool = False,
) -> Scene:
    """The scene as it is after an edit; what is not edited keeps its place, and so its pixels.

    Several edits at once are made in the order of the arguments.

    Args:
        scene: what to edit; it is left as it is.
        replace: objects to put in the place of others, by their names: ``{"cat": "dog"}``.
        recolour: shapes to give another colour: ``{"red heart": "blue"}``.
        background: another ground, a key of :data:`BACKGROUNDS`; its gradient stays.
        count: another number of the one kind of object that the scene has, 1 to 4. Fewer leaves the first ones where
            they are. More adds boxes on a grid of 8 beside those there are, of their size or of 48; where the boxes
            there are leave no room, as few of them as possible move.
        mirror: whether to reflect the two objects' boxes in the middle of the canvas, across it for left and right and
            down it for above and below. The objects themselves are not reflected. The caption then states the
            opposite relation.

    >>> scene = Scene((SceneObject("cat", (8, 40, 48)), SceneObject("owl", (72, 32, 48))), "sky")
    >>> edit(scene, replace={"cat": "dog"}, mirror=True).caption
    'a dog to the right of an owl on a sky background'

    Raises:
        ValueError: no edit is asked for, an object, colour or background is unknown or not in the scene, ``replace`` or
            ``recolour`` would make two kinds of object one, ``count`` is not 1 to 4 or the scene has two kinds, or
            ``mirror`` is asked of a scene without a relation.
    """
    if replace is None and recolour is None and background is None and count is None and not mirror:
        raise ValueError("edit takes at least one of replace, recolour, background, count and mirror, got none")
    if replace is not None:
        for new in replace.values():
            if new not in OBJECTS:
                raise ValueError(
                    f"replace must name objects of the vocabulary, such as 'cat' or 'red heart', got {new!r}"
                )
        scene = _rename(scene, replace, "replace")
    if recolour is not None:
        scene = _rename(scene, _recoloured(recolour), "recolour")
    if background is not None:
        if background not in BACKGROUNDS:
            raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
        scene = dataclasses.replace(scene, background=background)
    if count is not None:
        scene = _with_count(scene, count)
    return _mirrored(scene) if mirror else scene


def _rename(scene: Scene, names: Mapping[str, str], argument: str) -> Scene:
    there = list(dict.fromkeys(item.name for item in scene.objects))
    for old in names:
        if old not in there:
            raise ValueError(f"{argument} must name objects of the scene ({', '.join(there)}), got {old!r}")
    if len({names.get(name, name) for name in there}) < len(there):
        raise ValueError(f"{argument} must leave two kinds of object apart, got {dict(names)!r} for {scene.caption!r}")
    objects = (dataclasses.replace(item, name=names.get(item.name, item.name)) for item in scene.objects)
    return dataclasses.replace(scene, objects=tuple(objects))


def _recoloured(colours: Mapping[str, str]) -> dict[str, str]:
    names = {}
    for old, colour in colours.items():
        if old in OBJECTS and OBJECTS[old].colour is None:
            raise ValueError(f"recolour must name circles, squares or hearts with their colour, got {old!r}")
        if colour not in COLOURS:
            raise ValueError(f"recolour must give one of {', '.join(COLOURS)}, got {colour!r}")
        names[old] = f"{colour} {OBJECTS[old].noun}" if old in OBJECTS else old
    return names


def _mirrored(scene: Scene) -> Scene:
    facts: SceneFacts = scene.facts
    if facts.relation is None:
        raise ValueError(f"mirror must be asked of a scene of two objects in a relation, got {scene.caption!r}")

    def reflect(box: Box) -> Box:
        left, top, size = box
        if facts.category == "left_right":
            return CANVAS - left - size, top, size
        return left, CANVAS - top - size, size

    objects = tuple(dataclasses.replace(item, box=reflect(item.box)) for item in scene.objects)
    return dataclasses.replace(scene, objects=objects)


def _with_count(scene: Scene, count: int) -> Scene:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 4:
        raise ValueError(f"count must be a whole number from 1 to 4, got {count!r}")
    if scene.facts.relation is not None:
        raise ValueError(f"count must be asked of a scene with one kind of object, got {scene.caption!r}")
    name = scene.objects[0].name
    boxes = [item.box for item in scene.objects]
    boxes = boxes[:count] if count <= len(boxes) else _with_more(boxes, count)
    return dataclasses.replace(scene, objects=tuple(SceneObject(name, box) for box in boxes))


def _with_more(boxes: list[Box], count: int) -> list[Box]:
    """``count`` boxes apart from one another, as many as possible of them out of ``boxes`` and in their order."""
    for kept in range(len(boxes), -1, -1):
        for chosen in combinations(boxes, kept):
            for size in sorted({boxes[0][2], 48}, reverse=True):
                placed = _place(list(chosen), _candidates(size), count)
                if placed is not None:
                    return placed
    raise AssertionError("four boxes of 48 always have room")


def _place(boxes: list[Box], candidates: list[Box], count: int) -> list[Box] | None:
    """``boxes`` and the first of ``candidates`` that make it ``count`` without overlap, or None where none do."""
    if len(boxes) == count:
        return boxes
    free = [box for box in candidates if all(_apart(box, other) for other in boxes)]
    for index, box in enumerate(free):
        placed = _place([*boxes, box], free[index + 1 :], count)
        if placed is not None:
            return placed
    return None


def _candidates(size: int) -> list[Box]:
    """Boxes of ``size`` on the grid: in the middle of quarters, then of halves, then all others."""
    low, middle, high = (min((centre - size // 2) // _STEP * _STEP, CANVAS - size) for centre in (32, 64, 96))
    near = [
        (low, low),
        (high, low),
        (low, high),
        (high, high),
        (low, middle),
        (high, middle),
        (middle, low),
        (middle, high),
    ]
    grid = range(0, CANVAS - size + 1, _STEP)
    places = dict.fromkeys([*near, *((left, top) for top in grid for left in grid)])
    return [(left, top, size) for left, top in places if left >= 0 and top >= 0]


def _apart(first: Box, second: Box) -> bool:
    return any(first[axis] + first[2] <= second[axis] or second[axis] + second[2] <= first[axis] for axis in (0, 1))
