"""Finds the ground and the objects of a picture by synthesis: known sprites are laid on a fitted ground.

Nothing here is trained. A template of object ``k`` on a ground ``g`` adds ``T = c - a g`` to the ground (``c`` its
premultiplied colour, ``a`` its opacity), and laying it on the picture's departure ``D`` from the ground explains

    gain = |D|^2 - |D - T|^2 = 2 <D, T> - |T|^2

of the energy in its box. A coarse search at a quarter of the resolution gives places; around each, every object is
tried in steps of one pixel at half the resolution, where blur of a pixel or two no longer matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from .scene import CANVAS, background_rows, sprite
from .vocabulary import BACKGROUNDS, OBJECTS

NAMES = tuple(OBJECTS)
_COARSE_SIZES = (40, 48, 56, 64, 72, 80)
_GRADIENTS = np.linspace(-0.06, 0.06, 25)
_TELLING = 0.2
_TELLING_PIXEL = 0.08
_MIN_MERIT = 1.0
_MAX_ATTEMPTS = 12
_MAX_OBJECTS = 6

MIN_AGREEMENT = 0.8
"""Least part of a template's energy that the picture must share for its object to count as present."""
MAX_MIXTURE = 0.35
"""How far a picture may lie on the way from its object's template (0) to that of any other object (1)."""
MIN_GROUND = 0.3
"""Least part of the picture that must have the ground's colour."""
GROUND_TOLERANCE = 0.1


@dataclass(frozen=True)
class Ground:
    """The ground of a picture.

    Attributes:
        name: the nearest of :data:`BACKGROUNDS`.
        gradient: as :attr:`Scene.gradient`.
        share: part of the picture that has its colour, in [0, 1].
        offset: largest difference of a channel from the palette, in [0, 1] units.
        rows: colours from top to bottom, float32 (128, 1, 3).
    """

    name: str
    gradient: float
    share: float
    offset: float
    rows: np.ndarray


@dataclass(frozen=True)
class Detection:
    """What the best template says about one place of a picture.

    Attributes:
        name: a key of :data:`OBJECTS`.
        box: left, top and side length, in pixels of a picture of 128.
        agreement: 1 - |D - T|^2 / |T|^2, 1 where the picture is the template.
        mixture: how far the box, or any half of it, lies from the template towards that of another object or the bare
            ground, 0 to 1.
    """

    name: str
    box: tuple[int, int, int]
    agreement: float
    mixture: float

    @property
    def accepted(self) -> bool:
        """Whether a person would call it by this name."""
        return self.agreement >= MIN_AGREEMENT and self.mixture <= MAX_MIXTURE


def fit_ground(picture: np.ndarray) -> Ground:
    """The ground of the palette and its gradient that most of ``picture`` (128, 128, 3) has, whatever lies on it."""
    small = picture.reshape(32, 4, 32, 4, 3).mean((1, 3))
    grounds, models = _ground_models()
    distance = np.abs(small - models).max(-1)
    closeness = np.maximum(1.0 - (distance / GROUND_TOLERANCE) ** 2, 0.0).mean((1, 2))
    best = int(closeness.argmax())
    name, gradient = grounds[best]
    inliers = distance[best] < GROUND_TOLERANCE
    offset = np.zeros(3, np.float32)
    if inliers.any():
        offset = np.median((small - models[best])[inliers], 0).astype(np.float32)
    rows = np.clip(np.clip(background_rows(name, gradient, CANVAS), 0.0, 1.0) + offset, 0.0, 1.0)
    return Ground(name, gradient, float(inliers.mean()), float(np.abs(offset).max()), rows)


@lru_cache(maxsize=1)
def _ground_models() -> tuple[list[tuple[str, float]], np.ndarray]:
    grounds = [(name, float(gradient)) for name in BACKGROUNDS for gradient in _GRADIENTS]
    rows = np.stack([np.clip(background_rows(*ground, CANVAS), 0.0, 1.0) for ground in grounds])
    return grounds, rows.reshape(len(grounds), 32, 4, 1, 3).mean(2)


def find_objects(pictures: np.ndarray, grounds: list[Ground]) -> list[list[Detection]]:
    """Objects of each of ``pictures`` (B, 128, 128, 3) on its ground, accepted or not, the surest first."""
    departures = [picture - ground.rows for picture, ground in zip(pictures, grounds, strict=True)]
    coarse = _coarse_search(np.stack(departures), np.stack([ground.rows for ground in grounds]))
    return [_pursue(*item) for item in zip(departures, grounds, coarse, strict=True)]


def leftover(picture: np.ndarray, ground: Ground, detections: list[Detection]) -> float:
    """Largest mean square, in any window of 24 pixels, of what neither the ground nor an accepted object explains."""
    rest = np.square((picture - ground.rows).reshape(64, 2, 64, 2, 3).mean((1, 3))).mean(-1)
    for item in detections:
        if item.accepted:
            left, top, size = item.box
            rest[
                max(0, top // 2 - 1) : -(-(top + size) // 2) + 1, max(0, left // 2 - 1) : -(-(left + size) // 2) + 1
            ] = 0
    return _worst_window(rest, 12)


def _worst_window(values: np.ndarray, n: int) -> float:
    """Largest mean of ``values`` (H, W) in any window of n x n."""
    sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return float((sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n]).max() / n**2)


@dataclass(frozen=True)
class _Templates:
    """Every object at one size, its pixels averaged in squares.

    Attributes:
        layers: premultiplied colour and opacity, float32 (56, n, n, 4).
        own, cross, square: the moments that |c - a g|^2 = own - 2 cross . g + square |g|^2 takes, for a colour g.
    """

    layers: np.ndarray
    own: np.ndarray
    cross: np.ndarray
    square: np.ndarray

    def energy(self, ground: np.ndarray) -> np.ndarray:
        """|T|^2 of each template on each colour of ``ground`` (P, 3): (P, 56)."""
        return self.own - 2.0 * ground @ self.cross.T + np.square(ground).sum(-1, keepdims=True) * self.square


@lru_cache(maxsize=32)
def _templates(size: int, factor: int) -> _Templates:
    n = size // factor
    pictures = np.stack([np.concatenate(sprite(name, size), -1) for name in NAMES])
    layers = pictures.reshape(len(NAMES), n, factor, n, factor, 4).mean((2, 4))
    colour, opacity = layers[..., :3], layers[..., 3:]
    own, square = np.square(colour).sum((1, 2, 3)), np.square(opacity).sum((1, 2, 3))
    return _Templates(layers, own, (colour * opacity).sum((1, 2)), square)


def _with_projection(departure: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """(D, -D . g), whose product with (c, a) is <D, T>."""
    return np.concatenate([departure, -(departure * ground).sum(-1, keepdims=True)], -1)


def _coarse_search(departures: np.ndarray, rows: np.ndarray) -> list[list[np.ndarray]]:
    """For each picture and coarse size, the merit of the best object at each place (y, x), in steps of 4 pixels."""
    count = len(departures)
    small = departures.reshape(count, 32, 4, 32, 4, 3).mean((2, 4))
    ground = rows.reshape(count, 32, 4, 1, 3).mean(2)
    inputs = torch.from_numpy(np.ascontiguousarray(_with_projection(small, ground).transpose(0, 3, 1, 2)))
    energy = torch.from_numpy(np.square(small).sum(-1)[:, None])
    results: list[list[np.ndarray]] = [[] for _ in range(count)]
    for size in _COARSE_SIZES:
        templates, n = _templates(size, 4), size // 4
        kernels = torch.from_numpy(np.ascontiguousarray(templates.layers.transpose(0, 3, 1, 2)))
        projections = functional.conv2d(inputs, kernels).numpy()
        inside = functional.avg_pool2d(energy, n, 1).numpy()[:, 0] * n * n
        for index in range(count):
            middle = ground[index, n // 2 : n // 2 + 33 - n, 0]
            gains = 2.0 * projections[index] - templates.energy(middle).T[..., None]
            results[index].append(_merit(gains.max(0), inside[index]))
    return results


def _merit(gain: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Gain, which favours templates that explain much, times gain / energy, which favours those that explain all."""
    return np.maximum(gain, 0.0) * np.maximum(gain, 0.0) / (energy + 1e-6)


def _pursue(departure: np.ndarray, ground: Ground, merits: list[np.ndarray]) -> list[Detection]:
    """Best place first; places that overlap an accepted object, or were tried, are left out of what follows."""
    halved = sum(departure[y : y + CANVAS - 1, x : x + CANVAS - 1] for y in (0, 1) for x in (0, 1)) / 4.0
    signal = _with_projection(halved, (ground.rows[1:] + ground.rows[:-1]) / 2.0)
    found: list[Detection] = []
    for _ in range(_MAX_ATTEMPTS):
        level = int(np.argmax([merit.max() for merit in merits]))
        if merits[level].max() < _MIN_MERIT or sum(item.accepted for item in found) == _MAX_OBJECTS:
            break
        top, left = np.unravel_index(int(merits[level].argmax()), merits[level].shape)
        detection = _refine(signal, ground, (4 * int(left), 4 * int(top), _COARSE_SIZES[level]))
        found.append(detection)
        merits[level][max(0, top - 1) : top + 2, max(0, left - 1) : left + 2] = 0.0
        if detection.accepted:
            for size, merit in zip(_COARSE_SIZES, merits, strict=True):
                merit[_overlap(detection.box, size, len(merit)) > 0.2] = 0.0
    return found


def _overlap(box: tuple[int, int, int], size: int, places: int) -> np.ndarray:
    """Part of the smaller of ``box`` and a box of ``size`` at each place that lies in the other, (places, places)."""
    starts = 4 * np.arange(places)

    def shared(start: int) -> np.ndarray:
        return np.maximum(np.minimum(starts + size, start + box[2]) - np.maximum(starts, start), 0)

    return shared(box[1])[:, None] * shared(box[0])[None] / min(size, box[2]) ** 2


def _refine(signal: np.ndarray, ground: Ground, box: tuple[int, int, int]) -> Detection:
    """Tries every object within 4 pixels of the middle of ``box`` and at sizes within 8 of its own.

    ``signal`` (127, 127, 4) holds the means of 2 x 2 pixels, so every second one of them from any place on is the
    picture at half its resolution.
    """
    best: tuple[float, int, tuple[int, int, int]] = (-1.0, 0, box)
    for size in range(max(36, box[2] - 8), min(84, box[2] + 8) + 1, 4):
        shift = (box[2] - size) // 2
        lefts, tops = (
            [value for value in range(start + shift - 4, start + shift + 5) if 0 <= value <= CANVAS - size]
            for start in box[:2]
        )
        places = [(left, top, size) for top in tops for left in lefts]
        if not places:
            continue
        windows = np.stack([_window(signal, place) for place in places])
        colours = ground.rows[[top + size // 2 for _, top, _ in places], 0]
        templates = _templates(size, 2)
        projections = windows.reshape(len(places), -1) @ templates.layers.reshape(len(NAMES), -1).T
        energy = np.square(windows[..., :3]).reshape(len(places), -1).sum(1, keepdims=True)
        merit = _merit(2.0 * projections - templates.energy(colours), energy)
        place, kind = np.unravel_index(int(merit.argmax()), merit.shape)
        if merit[place, kind] > best[0]:
            best = (float(merit[place, kind]), int(kind), places[place])
    return _weigh(_window(signal, best[2])[..., :3], ground, *best[1:])


def _window(signal: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    left, top, size = box
    return signal[top : top + size : 2, left : left + size : 2]


def _weigh(window: np.ndarray, ground: Ground, kind: int, box: tuple[int, int, int]) -> Detection:
    """How well object ``kind`` agrees with the ``window`` of its ``box``, and whether another has a part in it."""
    _, top, size = box
    templates = _templates(size, 2).layers
    layers = templates[..., :3] - templates[..., 3:] * ground.rows[top : top + size].reshape(size // 2, 2, 1, 3).mean(1)
    own = layers[kind]
    rest = window - own
    agreement = 1.0 - np.square(rest).sum() / np.square(own).sum()
    others = np.concatenate([np.delete(layers, kind, 0), np.zeros_like(own)[None]])
    return Detection(NAMES[kind], box, float(agreement), _mixture(rest, own, others - own))


def _mixture(rest: np.ndarray, own: np.ndarray, towards: np.ndarray) -> float:
    """Largest <rest, t> / |t|^2 of any ``towards`` t, over the box and over those halves of it where t is large."""
    n = len(rest) // 2
    whole, first, second = slice(None), slice(None, n), slice(n, None)
    largest = 0.0
    for rows, columns in (whole, whole), (first, whole), (second, whole), (whole, first), (whole, second):
        part = towards[:, rows, columns]
        energy = np.square(part).sum((1, 2, 3))
        half = own[rows, columns]
        least = 0.0 if rows == columns else max(_TELLING * np.square(half).sum(), _TELLING_PIXEL * half[..., 0].size)
        telling = energy > least
        along = (part * rest[rows, columns]).sum((1, 2, 3))[telling] / energy[telling]
        largest = max(largest, float(along.max(initial=0.0)))
    return largest
