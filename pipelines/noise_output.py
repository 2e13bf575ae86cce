"""What noise optimization returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .flowopt_output import as_output_type
from .noise_run import NoiseOptimizationState

__all__ = ["NoiseOptimizationPipelineOutput", "Recorder"]


@dataclass
class NoiseOptimizationPipelineOutput(BaseOutput):
    """The best pictures, and how they came about.

    Attributes:
        images: the best pictures, as `output_type` says.
        rewards: (steps, B) float32, of each iteration's pictures; NaN after a sample has ended.
        best_step: (B,) int64, the iteration of each best picture.
        initial_images: the first iteration's pictures, as `output_type` says.
        latents: (B, *latent_shape) float32, the noise of the best pictures.
        terms: the reward's parts by name, each (steps, B).
        norms: (steps, B) the noise's norm over sqrt(d - 1), where noise is likeliest.
        monitor: (steps, B) of the held-out reward, if there was one.
        stopped: for each sample why it ended early, or None.
        num_evaluations: pictures made for each sample.
        interrupted: whether the keyboard ended the run.
        feasible: for each sample whether its best picture satisfies the constraints; None without any.
        kkt: (steps, B) under equality constraints, ||(gradient + G^T lambda, c)|| of each iteration's noise; NaN for
            the last, whose gradient isn't taken.
        multi_step_images: the many-step model's pictures of `latents`, if there was one.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    rewards: Tensor
    best_step: Tensor
    initial_images: list[PIL.Image.Image] | np.ndarray | Tensor
    latents: Tensor
    terms: dict[str, Tensor]
    norms: Tensor
    monitor: Tensor | None
    stopped: list[str | None]
    num_evaluations: int
    interrupted: bool = False
    feasible: list[bool] | None = None
    kkt: Tensor | None = None
    multi_step_images: list[PIL.Image.Image] | np.ndarray | Tensor | None = None


class Recorder:
    """Collects a run's states into its output."""

    def __init__(self) -> None:
        self.interrupted = False
        self.last: NoiseOptimizationState | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._numbers: list[tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]] = []
        self._kkt: list[Tensor | None] = []

    def take(self, state: NoiseOptimizationState) -> None:
        """Adds an iteration; of its pictures only the first's are kept."""
        if self._first is None:
            self._first = state.best_images, state.best_latents
        self.last = state
        self._kkt.append(state.kkt)
        self._numbers.append((state.rewards, state.norms, state.terms, state.monitor))

    def troubles(self) -> list[str]:
        """What went wrong, a line a sample."""
        reasons = [(row, reason) for row, reason in enumerate(self.last.stopped) if reason and "finite" in reason]
        return [f"sample {row}: {reason}; its result is the best before that" for row, reason in reasons]

    def output(self, output_type: str) -> NoiseOptimizationPipelineOutput:
        """The result."""
        rewards, norms, terms, monitor = zip(*self._numbers, strict=True)
        state = self.last
        pictures = (state.best_images, self._first[0])
        if output_type == "latent":
            images, initial = state.best_latents, self._first[1]
        else:
            images, initial = (self.pictures(batch, output_type) for batch in pictures)
        return NoiseOptimizationPipelineOutput(
            images=images,
            rewards=torch.stack(rewards),
            best_step=state.best_step,
            initial_images=initial,
            latents=state.best_latents,
            terms={name: torch.stack([term[name] for term in terms]) for name in terms[0]},
            norms=torch.stack(norms),
            monitor=None if monitor[0] is None else torch.stack(monitor),
            stopped=list(state.stopped),
            num_evaluations=state.num_evaluations,
            interrupted=self.interrupted,
            feasible=None if state.violations is None else (state.violations <= 0).tolist(),
            kkt=self._all_kkt(),
        )

    def _all_kkt(self) -> Tensor | None:
        if all(values is None for values in self._kkt):
            return None
        blank = torch.full_like(self._numbers[0][0], float("nan"))
        return torch.stack([blank if values is None else values for values in self._kkt])

    @staticmethod
    def pictures(images: Tensor, output_type: str) -> Any:
        """Pictures (B, 3, H, W) as `output_type` says; tensors for "latent"."""
        images = images.float().cpu()
        return images if output_type == "latent" else as_output_type(images, output_type)
