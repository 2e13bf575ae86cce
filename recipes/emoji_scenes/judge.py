"""Judges whether pictures show their captions: an oracle that shares no weights with any generator.

:mod:`.detector` explains a picture by the known sprites; here its findings are compared with what a caption states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .captions import SceneFacts, parse_caption
from .detector import MIN_GROUND, Detection, Ground, find_objects, fit_ground, leftover
from .scene import CANVAS, SceneObject, relation_of
from .vocabulary import OBJECTS

MAX_GROUND_OFFSET = 0.06
"""Largest difference, in [0, 1] units of a channel, at which a ground still has its palette's colour."""
MAX_LEFTOVER = 0.01
"""Largest mean square, in a window of 24 pixels, that neither the ground nor an object need explain."""
_CHUNK = 32


@dataclass(frozen=True)
class Verdict:
    """What a picture shows, and whether that is what its caption states.

    Attributes:
        facts: what the caption states.
        background: the ground that the picture has, a key of :data:`BACKGROUNDS`, or None where it has none of them.
        objects: objects found, in boxes of a canvas of 128.
        rejected: places where something lies that is not clearly any object, with the nearest.
        leftover: largest mean square, in any window of 24 pixels, of what no object and no ground explains.
        background_right: the ground is the stated one.
        objects_right: the kinds of objects found are the stated ones, whatever their colours and number.
        colour_right: every stated colour is found on its shape and no other colour; None where none is stated.
        count_right: there are as many objects as stated.
        relation_right: the two objects lie as stated; None where no relation is stated.
        clean: nothing lies in the picture that is not clearly an object.
    """

    facts: SceneFacts
    background: str | None
    objects: tuple[Detection, ...]
    rejected: tuple[Detection, ...]
    leftover: float
    background_right: bool
    objects_right: bool
    colour_right: bool | None
    count_right: bool
    relation_right: bool | None
    clean: bool

    @property
    def shown(self) -> bool:
        """Whether the stated objects are there in their colours and number, and no others."""
        return self.objects_right and self.count_right and self.colour_right is not False

    @property
    def correct(self) -> bool:
        """Whether the picture shows all that its caption states and nothing else."""
        return self.shown and self.background_right and self.relation_right is not False and self.clean

    @property
    def right_share(self) -> float:
        """The share of what the caption states that is right, 1 where and only where the picture is `correct`.

        One attribute each: the background, every stated object (a name of the colour, each copy by itself), their
        number, their relation where one is stated, and that nothing else lies in the picture.
        """
        stated = Counter({name: self.facts.count for name in self.facts.objects})
        seen = stated & Counter(item.name for item in self.objects)
        right = [self.background_right, self.count_right, self.clean, *[True] * seen.total()]
        right += [] if self.relation_right is None else [self.relation_right]
        return sum(right) / (len(right) + stated.total() - seen.total())


@torch.no_grad()
def check_scene(images: Tensor | Image.Image | Sequence[Image.Image], captions: str | Sequence[str]) -> list[Verdict]:
    """Judges each picture against its caption.

    Args:
        images: float (B, 3, H, W) in [0, 1] on any device, or PIL images; square, of any size.
        captions: one a picture, as :func:`write_caption` writes them; a single one holds for all pictures.

    Returns:
        One verdict a picture.

    Raises:
        ValueError: an image is not square or not a picture in [0, 1], there are not as many captions as images, or a
            caption is not of the grammar.
        TypeError: ``images`` is neither a tensor nor PIL.
    """
    pictures = _to_canvas(images)
    captions = [captions] * len(pictures) if isinstance(captions, str) else list(captions)
    if len(captions) != len(pictures):
        raise ValueError(f"captions must be one for each of the {len(pictures)} images, got {len(captions)}")
    stated = [parse_caption(caption) for caption in captions]
    verdicts = []
    for start in range(0, len(pictures), _CHUNK):
        chunk = pictures[start : start + _CHUNK]
        grounds = [fit_ground(picture) for picture in chunk]
        findings = find_objects(chunk, grounds)
        verdicts += map(_judge, stated[start : start + _CHUNK], chunk, grounds, findings)
    return verdicts


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Fractions of ``verdicts`` that are right, by category as GenEval reports them.

    Returns:
        ``"background"``: the stated ground, over all captions. ``"one object"``, ``"counts"``: the stated object in
        its colour and number and no other. ``"two objects"``: both stated objects and no other, over all captions with
        a relation. ``"left/right"``, ``"above/below"``: both, and they lie as stated. ``"colour"``: stated colours
        right, over all captions that state one. ``"overall"``: all that is stated and nothing else. A category that no
        caption belongs to is left out.

    Raises:
        ValueError: ``verdicts`` is empty.
    """
    if not verdicts:
        raise ValueError("verdicts must hold at least one verdict, got none")
    of = {name: [v for v in verdicts if v.facts.category == name] for name in _CATEGORIES}
    both = of["left_right"] + of["above_below"]
    rows = {
        "background": [v.background_right for v in verdicts],
        "one object": [v.shown for v in of["one"]],
        "two objects": [v.shown for v in both],
        "left/right": [v.shown and v.relation_right for v in of["left_right"]],
        "above/below": [v.shown and v.relation_right for v in of["above_below"]],
        "counts": [v.shown for v in of["count"]],
        "colour": [v.colour_right for v in verdicts if v.colour_right is not None],
        "overall": [v.correct for v in verdicts],
    }
    return {name: sum(map(bool, values)) / len(values) for name, values in rows.items() if values}


_CATEGORIES = ("one", "count", "left_right", "above_below")


def _judge(facts: SceneFacts, picture: np.ndarray, ground: Ground, findings: list[Detection]) -> Verdict:
    plain = ground.share >= MIN_GROUND and ground.offset <= MAX_GROUND_OFFSET
    background = ground.name if plain else None
    found = tuple(item for item in findings if item.accepted)
    rest = leftover(picture, ground, findings)
    names = [item.name for item in found]
    shapes = {name for name in facts.objects if OBJECTS[name].colour}
    nouns = {OBJECTS[name].noun for name in shapes}
    shapes_found = {name for name in names if OBJECTS[name].noun in nouns}
    relation_right = None
    if facts.relation is not None:
        boxes = {item.name: SceneObject(item.name, item.box) for item in found}
        relation_right = sorted(names) == sorted(facts.objects)
        relation_right = relation_right and relation_of(*(boxes[name] for name in facts.objects)) == facts.relation
    return Verdict(
        facts=facts,
        background=background,
        objects=found,
        rejected=tuple(item for item in findings if not item.accepted),
        leftover=rest,
        background_right=background == facts.background,
        objects_right={OBJECTS[name].noun for name in names} == {OBJECTS[name].noun for name in facts.objects},
        colour_right=shapes_found == shapes if shapes else None,
        count_right=len(found) == facts.count * len(facts.objects),
        relation_right=relation_right,
        clean=rest <= MAX_LEFTOVER,
    )


def _to_canvas(images: Tensor | Image.Image | Sequence[Image.Image]) -> np.ndarray:
    """Pictures as float32 (B, 128, 128, 3), averaged or interpolated to that size."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be a float tensor (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        batch = images.detach().to("cpu", torch.float32)
        if batch.numel() and not (batch.amin() >= -1e-3 and batch.amax() <= 1.0 + 1e-3):
            raise ValueError(f"images must lie in [0, 1], got values from {batch.amin():.3g} to {batch.amax():.3g}")
    else:
        items = [images] if isinstance(images, Image.Image) else list(images)
        for item in items:
            if not isinstance(item, Image.Image):
                raise TypeError(f"images must be a tensor or PIL images, got {type(item).__name__}")
        if len({item.size for item in items}) > 1:
            raise ValueError(f"images must be of one size, got {sorted({item.size for item in items})}")
        arrays = [np.asarray(item.convert("RGB"), np.float32) / 255.0 for item in items]
        batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) if arrays else torch.empty(0, 3, CANVAS, CANVAS)
    if batch.shape[2] != batch.shape[3]:
        raise ValueError(f"images must be square, got {batch.shape[3]} x {batch.shape[2]} pixels")
    if batch.shape[-1] != CANVAS and len(batch):
        batch = functional.interpolate(batch, (CANVAS, CANVAS), mode="bicubic", antialias=True).clamp(0.0, 1.0)
    return np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
