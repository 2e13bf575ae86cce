"""Pictures changed within a small bound so that their classes can be told apart less well."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.optim.analysis.bayes_error import Bandwidth, Kernel, bayes_error, label_bandwidth
from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

__all__ = ["CloakResult", "CloakState", "cloak"]

Features = Callable[[Tensor], Tensor]
LEVELS = 255


@dataclass(frozen=True)
class CloakState:
    """Where a run is, after an outer step.

    Attributes:
        outer: from 1; 0 for the originals.
        bayes_error: the estimate of the pictures as they would be saved.
        images: (N, C, H, W), before rounding: `start` of a run that goes on from here.
    """

    outer: int
    bayes_error: float
    images: Tensor


@dataclass(frozen=True)
class CloakResult:
    """Protected pictures.

    Attributes:
        images: (N, C, H, W) float32, multiples of 1/255 within eps of the originals.
        bayes_error: the estimate of the originals and after each outer step, by the features of that time.
        max_change: of any value, a multiple of 1/255.
        psnr: (N,), of each picture against its original in dB; infinite where nothing changed.
    """

    images: Tensor
    bayes_error: list[float]
    max_change: float
    psnr: Tensor

    @property
    def best_so_far(self) -> list[float]:
        """The highest estimate up to each outer step."""
        return [max(self.bayes_error[: i + 1]) for i in range(len(self.bayes_error))]

    def after_jpeg(self, quality: int = 85) -> Tensor:
        """The pictures as a JPEG of that quality gives them back, which destroys part of what was done.

        Raises:
            ValueError: pictures of other than three channels, or a quality outside of 1 to 95.
        """
        import numpy as np
        from PIL import Image

        if self.images.shape[1] != 3 or not 1 <= quality <= 95:
            raise ValueError(f"`quality` is {quality}; takes 1 to 95, for pictures of three channels")
        found = []
        for image in self.images:
            file, values = io.BytesIO(), (image * LEVELS).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(values).save(file, "jpeg", quality=quality)
            found.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / LEVELS)
        return torch.stack(found)


def cloak(
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    feature_fn: Features | None = None,
    refit: Callable[[Tensor, Tensor, int], Features] | None = None,
    outer_steps: int = 10,
    inner_steps: int = 15,
    step_size: float | None = None,
    bandwidth: Bandwidth = "auto",
    kernel: Kernel = "rbf",
    optimizer: Literal["sign", "adamw"] = "sign",
    fixed: Tensor | None = None,
    start: Tensor | None = None,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
    callback: Callable[[CloakState], Any] | None = None,
) -> CloakResult:
    """Raises the estimated Bayes error of labelled pictures by projected gradient ascent: max BE(X'), |X' - X| <= eps.

    Source: Zhang, Sun, Lim, Zhang, "Towards Provably Unlearnable Examples via Bayes Error Optimisation"
    (arXiv 2511.08191). It acts against classifiers that are trained on the pictures; the paper doesn't measure
    finetuned generators.

    Args:
        images: (N, C, H, W) floating in [0, 1]; rounded to 8 bits first, from which eps counts.
        labels: (N,) integers from 0, of two classes or more.
        eps: >= 1/255, the largest change of a value.
        feature_fn: pictures (B, C, H, W) to (B, ...), with gradients; None is the pixels themselves.
        refit: pictures, labels and the outer step (from 0) to new features, before each outer step (the paper
            trains a classifier). None keeps `feature_fn`.
        outer_steps: >= 1.
        inner_steps: of the ascent, in each.
        step_size: None is eps / 5 for "sign" and 1e-3 for "adamw".
        bandwidth: of the kernel; "auto" is found on the originals with each new features.
        kernel: see :func:`~trimtab.optim.bayes_error`.
        optimizer: "sign" steps by the gradient's signs, "adamw" is the paper's.
        fixed: (N,) bool, pictures that count and don't change, such as other people's.
        start: (N, C, H, W), where the ascent begins; None is a random point of the ball's inner tenth.
        batch_size: pictures at once through the features; 128 is the paper's.
        generator: of that point; None is seed 0.
        callback: called with a :class:`CloakState` after each outer step; True ends the run there.

    Returns:
        A :class:`CloakResult`: of the best outer step by features that stay, of the last one where they are refitted.

    Raises:
        TypeError: pictures that are no floating tensor, labels that are no integers.
        ValueError: shapes that do not fit, pictures outside of [0, 1], fewer than two classes, a value out of range.
        RuntimeError: a gradient that isn't finite, which names the outer step.

    Example:
        >>> images = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> result = cloak(images, torch.arange(20) % 2, outer_steps=1, inner_steps=2)
        >>> round(result.max_change * 255) <= 8
        True
    """
    original = _checked_images(images, labels, fixed, start)
    eps = checked_number("eps", eps, above=0)
    if eps * LEVELS < 1 - 1e-6:
        raise ValueError(f"`eps` is {eps:g}; takes 1/255 or more: less is nothing after rounding to 8 bits")
    checked_count("outer_steps", outer_steps)
    checked_count("inner_steps", inner_steps)
    checked_count("batch_size", batch_size)
    checked_choice("optimizer", optimizer, ("sign", "adamw"))
    step = {"sign": eps / 5, "adamw": 1e-3}[optimizer]
    step = step if step_size is None else checked_number("step_size", step_size, above=0)
    moving = torch.ones(len(original), dtype=torch.bool) if fixed is None else ~fixed.cpu()
    low, high = (original - eps).clamp(0, 1), (original + eps).clamp(0, 1)
    x = original.clone()
    given = start.detach().to(original) if start is not None else _nearby(original, eps, checked_generator(generator))
    x[moving] = torch.minimum(torch.maximum(given, low), high)[moving]

    features, estimate = feature_fn, None
    estimates: list[float] = []
    best, best_value = original, -1.0
    for outer in range(outer_steps):
        if refit is not None:
            features = refit(round_towards(x, original, eps), labels, outer)
        if refit is not None or estimate is None:
            estimate = _Estimate(features, original, labels, bandwidth, kernel, batch_size)
        if not estimates:
            estimates.append(estimate(original))
        ascent = _Ascent(optimizer, step, x[moving])
        for _ in range(inner_steps):
            gradient = estimate.gradient(x)
            if not bool(torch.isfinite(gradient).all()):
                raise RuntimeError(f"the gradient is not finite in outer step {outer + 1}")
            moved = ascent(x[moving], gradient[moving])
            x[moving] = torch.minimum(torch.maximum(moved, low[moving]), high[moving])
        rounded = round_towards(x, original, eps)
        estimates.append(estimate(rounded))
        if refit is not None or estimates[-1] > best_value:
            best, best_value = rounded, estimates[-1]
        if callback is not None and callback(CloakState(outer + 1, estimates[-1], x.clone())):
            break
    change = (best - original).abs()
    psnr = -10 * change.double().square().mean((1, 2, 3)).log10()
    return CloakResult(best, estimates, float(change.max()), psnr.float())


def round_towards(images: Tensor, original: Tensor, eps: float) -> Tensor:
    """Pictures in multiples of 1/255 within eps of the originals, which are such: rounded towards them.

    Args:
        images: any shape, floating.
        original: the same shape, multiples of 1/255.
        eps: the bound.

    Example:
        >>> (round_towards(torch.tensor([0.5]), torch.tensor([100 / 255]), 8 / 255) * 255).round().tolist()
        [108.0]
    """
    start = (original.double() * LEVELS).round()
    most = int(eps * LEVELS + 1e-6)
    change = (images.double() * LEVELS - start).clamp(-most, most)
    whole = (change.abs() + 1e-3).floor() * change.sign()  # what float32 leaves of a whole step is one
    return ((start + whole).clamp(0, LEVELS) / LEVELS).float()


class _Estimate:
    """The Bayes error of pictures by features, and its gradient, a batch at a time through the features."""

    def __init__(
        self, features: Any, original: Tensor, labels: Tensor, bandwidth: Any, kernel: Any, batch: int
    ) -> None:
        self.features = nn.Identity() if features is None else features
        if isinstance(self.features, nn.Module):
            self.features.eval()
        self.labels, self.batch, self.options = labels, batch, {"kernel": kernel, "bandwidth": bandwidth}
        if kernel == "rbf" and bandwidth == "auto":
            self.options["bandwidth"] = label_bandwidth(self._all(original), labels)

    @torch.no_grad()
    def _all(self, x: Tensor) -> Tensor:
        return torch.cat([self.features(part).flatten(1).float() for part in x.split(self.batch)])

    def __call__(self, x: Tensor) -> float:
        return float(bayes_error(self._all(x), self.labels, **self.options))

    def gradient(self, x: Tensor) -> Tensor:
        z = self._all(x).requires_grad_()
        with torch.enable_grad():
            (of_features,) = torch.autograd.grad(bayes_error(z, self.labels, **self.options), z)
            found = []
            for part, slopes in zip(x.split(self.batch), of_features.split(self.batch), strict=True):
                leaf = part.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.features(leaf).flatten(1).float(), leaf, slopes)
                found.append(gradient)
        return torch.cat(found)


class _Ascent:
    def __init__(self, kind: str, step: float, x: Tensor) -> None:
        self.kind, self.step, self.x = kind, step, x.clone()
        self.adamw = torch.optim.AdamW([self.x], lr=step, maximize=True) if kind == "adamw" else None

    def __call__(self, x: Tensor, gradient: Tensor) -> Tensor:
        if self.adamw is None:
            return x + self.step * gradient.sign()
        self.x.copy_(x)
        self.x.grad = gradient
        self.adamw.step()
        return self.x.clone()


def _nearby(original: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Duplicates have no gradient between them; a little noise parts them."""
    noise = torch.rand(original.shape, generator=generator, device=generator.device).to(original)
    return original + (noise * 2 - 1) * (0.1 * eps)


def _checked_images(images: Any, labels: Any, fixed: Any, start: Any) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` is {got}; takes a floating tensor in [0, 1]")
    if images.ndim != 4 or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"`images` has shape {tuple(images.shape)}; takes (N, C, H, W) with values in [0, 1]")
    for name, value, shape in (("fixed", fixed, images.shape[:1]), ("start", start, images.shape)):
        if value is not None and value.shape != shape:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; takes {tuple(shape)}")
    if fixed is not None and (fixed.dtype != torch.bool or bool(fixed.all())):
        raise ValueError("`fixed` takes bool values that leave at least one picture to change")
    counts = labels.bincount() if isinstance(labels, Tensor) and labels.dtype == torch.int64 and len(labels) else None
    if counts is not None and bool((counts == 1).any()):
        warnings.warn(
            f"a class has one picture only, {(counts == 1).nonzero()[:4, 0].tolist()}: nothing is like it", stacklevel=3
        )
    return (images.detach().cpu().float() * LEVELS).round() / LEVELS
