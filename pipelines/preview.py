"""What the picture will be, while a sampler is still at work: the denoised estimate of its latents, decoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch

from .families import family_of
from .flowopt_output import as_output_type
from .latents import decode_latents

__all__ = ["StepPreview", "denoised_between"]


def denoised_between(
    before: torch.Tensor, after: torch.Tensor, levels: tuple[tuple[float, float], tuple[float, float]]
) -> torch.Tensor | None:
    """The clean latents on the line of two noisy ones.

    With x_i = alpha_i x0 + sigma_i n at both places,

        x0 = (sigma_2 x_1 - sigma_1 x_2) / (alpha_1 sigma_2 - alpha_2 sigma_1),

    which is what the model predicted, exactly, after a step of Euler's method of a flow or of DDIM.

    Args:
        before: (B, ...) latents before a step.
        after: the same after it.
        levels: (alpha, sigma) before and after.

    Returns:
        The latents, float32; None where the step did not change the noise level.

    Example:
        >>> x0, n = torch.tensor([1.0]), torch.tensor([3.0])
        >>> denoised_between(0.2 * x0 + 0.8 * n, 0.6 * x0 + 0.4 * n, ((0.2, 0.8), (0.6, 0.4))).round(decimals=4).item()
        1.0
    """
    (alpha_1, sigma_1), (alpha_2, sigma_2) = levels
    determinant = alpha_1 * sigma_2 - alpha_2 * sigma_1
    if abs(determinant) < 1e-6:
        return None
    return (sigma_2 * before.float() - sigma_1 * after.float()) / determinant


class StepPreview:
    """A ``callback_on_step_end`` that gives previews, from the second step of each run of the sampler on.

    Of schedulers whose noise level is not known (`trimtab.guidance.NoiseSchedule`) and of videos it gives none.

    Args:
        on_preview: gets the first picture of the batch.
        interval: seconds between previews, at least; the second step of the first run is always shown.
        height: of the pictures in pixels; needed where the pipeline's latents are tokens.
        width: of the pictures in pixels.

    Example:
        >>> pipe("a cat", callback_on_step_end=StepPreview(lambda image: image.show()))          # doctest: +SKIP
    """

    def __init__(
        self,
        on_preview: Callable[[PIL.Image.Image], None],
        *,
        interval: float = 0.5,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        self._on_preview, self._interval = on_preview, interval
        self._size = height, width
        self._shown = -float("inf")
        self._before: torch.Tensor | None = None
        self._levels: list[tuple[float, float]] | None = None

    @torch.no_grad()
    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the latents after a step; changes nothing."""
        latents = tensors["latents"].detach()
        if step == 0:
            self._levels = _levels_of(pipe.scheduler)
        before, self._before = (None if step == 0 else self._before), latents
        due = time.monotonic() - self._shown >= self._interval
        if before is None or before.shape != latents.shape or self._levels is None or not due:
            return {}
        if step + 1 >= len(self._levels):  # a scheduler with more evaluations than noise levels
            return {}
        x0 = denoised_between(before[:1], latents[:1], (self._levels[step], self._levels[step + 1]))
        image = None if x0 is None else self._decoded(pipe, x0)
        if image is not None:
            self._on_preview(image)
            self._shown = time.monotonic()
        return {}

    def _decoded(self, pipe: Any, x0: torch.Tensor) -> PIL.Image.Image | None:
        family = family_of(pipe)
        if family.video:
            return None
        factor = getattr(pipe, family.scale_factor)
        height, width = self._size
        if height is None or width is None:
            if family.tokens or x0.ndim != 4:
                return None
            height, width = (side * factor for side in x0.shape[-2:])
        if not family.returns_latents:
            side = factor * family.patch
            x0 = x0.transpose(1, 2).unflatten(2, (height // side, width // side))
        images = decode_latents(pipe.vae, family, x0, height // factor, width // factor)
        return as_output_type(images.float().cpu().nan_to_num(), "pil")[0]


def _levels_of(scheduler: Any) -> list[tuple[float, float]] | None:
    from trimtab.guidance.prediction import NoiseSchedule

    try:
        return [(entry.alpha, entry.sigma) for entry in NoiseSchedule(scheduler).predictions]
    except (NotImplementedError, ValueError, IndexError):
        return None
