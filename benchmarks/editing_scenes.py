"""Edits of scenes whose right result is known, and how near a picture comes to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trimtab.recipes.emoji_scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    Scene,
    check_scene,
    edit,
    sample_scene,
)

__all__ = ["FIGURES", "KINDS", "EditCase", "edit_cases", "measure", "mean_interval", "ssim_map"]

KINDS = ("object", "colour", "background", "relation")
FIGURES = ("success", "psnr_outside", "psnr_inside", "ssim_outside", "ssim_inside")


@dataclass(frozen=True)
class EditCase:
    """An edit and its truth.

    Attributes:
        kind: one of `KINDS`.
        source: the scene that the picture shows.
        target: the scene that it should show; all that the edit doesn't name keeps its pixels.
    """

    kind: str
    source: Scene
    target: Scene

    @property
    def changed(self) -> Tensor:
        """(128, 128) whether a pixel of the picture changes by more than rounding does."""
        difference = np.abs(self.source.render() - self.target.render()).max(-1)
        return torch.from_numpy(difference > 1 / 255)


def edit_cases(count: int, seed: int = 0) -> list[EditCase]:
    """Edits of each kind in turn; neither caption was ever in training.

    Args:
        count: number of edits, >= 1.
        seed: of the scenes.
    """
    rng = np.random.default_rng(seed)
    cases: list[EditCase] = []
    while len(cases) < count:
        kind = KINDS[len(cases) % len(KINDS)]
        source = sample_scene(rng, category=_category(rng, kind), held_out=True)
        target = _edited(rng, kind, source)
        if target is not None and target.facts.is_held_out():
            cases.append(EditCase(kind, source, target))
    return cases


def _category(rng: np.random.Generator, kind: str) -> str:
    relations = ("left_right", "above_below")
    return str(rng.choice(relations if kind == "relation" else ("one", "one", *relations)))


def _edited(rng: np.random.Generator, kind: str, scene: Scene) -> Scene | None:
    """The scene after a random edit of this kind; None where it has nothing to edit."""
    names = list(dict.fromkeys(item.name for item in scene.objects))
    if kind == "background":
        return edit(scene, background=str(rng.choice([name for name in BACKGROUNDS if name != scene.background])))
    if kind == "relation":
        return edit(scene, mirror=True)
    if kind == "colour":
        names = [name for name in names if OBJECTS[name].colour]
    if not names:
        return None
    old = str(rng.choice(names))
    there = {OBJECTS[item.name].noun for item in scene.objects}
    if kind == "object":
        return edit(scene, replace={old: str(rng.choice([n for n, o in OBJECTS.items() if o.noun not in there]))})
    taken = {item.colour for item in scene.objects}
    return edit(scene, recolour={old: str(rng.choice([name for name in COLOURS if name not in taken]))})


def measure(images: Tensor, cases: Sequence[EditCase]) -> dict[str, list[float]]:
    """Each picture against the truth of its edit.

    Args:
        images: (B, 3, 128, 128) float in [0, 1] on the CPU.
        cases: B edits.

    Returns:
        For each of `FIGURES` B numbers. `success`: 1 where the judge finds all that the target's caption states and
        nothing else. PSNR in dB and mean SSIM to the rendered truth, outside of what the edit changes and inside of it.
    """
    verdicts = check_scene(images, [case.target.caption for case in cases])
    truth = torch.from_numpy(np.stack([case.target.render() for case in cases])).permute(0, 3, 1, 2)
    inside = torch.stack([case.changed for case in cases])
    error = (images - truth).square().mean(1)
    similarity = ssim_map(images, truth).mean(1)
    figures = {"success": [float(verdict.correct) for verdict in verdicts]}
    for place, where in (("outside", ~inside), ("inside", inside)):
        count = where.sum((1, 2)).clamp_min(1)
        mean_error = ((error * where).sum((1, 2)) / count).clamp_min(1e-10)
        figures[f"psnr_{place}"] = (-10 * mean_error.log10()).tolist()
        figures[f"ssim_{place}"] = ((similarity * where).sum((1, 2)) / count).tolist()
    return figures


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity at each pixel and channel (Wang et al., 2004): a Gaussian window of 11 pixels, sigma 1.5.

    Args:
        x: (B, C, H, W) in [0, 1].
        y: the same shape.

    Returns:
        (B, C, H, W) in [-1, 1].
    """
    channels = x.shape[1]
    axis = torch.arange(-5, 6, dtype=x.dtype)
    window = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blurred(values: Tensor) -> Tensor:
        values = functional.pad(values, (5, 5, 5, 5), mode="reflect")
        rows = functional.conv2d(values, window.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
        return functional.conv2d(rows, window.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    one, two = 0.01**2, 0.03**2
    return ((2 * mean_x * mean_y + one) * (2 * covariance + two)) / (
        (mean_x**2 + mean_y**2 + one) * (variance_x + variance_y + two)
    )


def mean_interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap, seeded, of a mean.

    Example:
        >>> low, high = mean_interval([1.0, 2.0, 3.0, 2.0])
        >>> 1.0 < low < 2.0 < high < 3.0
        True
    """
    values = np.asarray(values, float)
    means = values[np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))].mean(1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
