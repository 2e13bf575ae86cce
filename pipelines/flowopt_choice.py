"""Which of an edit's iterates is the result."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .flowopt_output import FlowOptState

__all__ = ["Chooser", "psnr"]


class Chooser:
    """Keeps the iterate that `selection` wants, and the curves that it was chosen by.

    Args:
        selection: "last", a function of (images, prompts) to (B,) scores, the highest of which wins, or None for the
            least residual: of an inversion.
        prompts: for the function, one a picture.
        pictures: (B, 3, H, W), the sources, for the similarity.
    """

    def __init__(self, selection: Any, prompts: list[Any], pictures: torch.Tensor) -> None:
        self._selection, self._prompts, self._pictures = selection, prompts, pictures
        self._best: torch.Tensor | None = None
        self.selected = torch.zeros(len(pictures), dtype=torch.long)
        self.latents: torch.Tensor | None = None
        self.noise: torch.Tensor | None = None

    def scored(self, state: FlowOptState) -> FlowOptState:
        """The state with what `selection` gives for it, where that is a function."""
        if not callable(self._selection):
            return state
        images = state.images
        scores = torch.as_tensor(self._selection(images, self._prompts)).detach().float().cpu()
        if scores.shape != (len(images),):
            raise ValueError(f"`selection` gives shape {tuple(scores.shape)}; takes ({len(images)},), one a picture")
        return dataclasses.replace(state, scores=scores, similarities=psnr(images, self._pictures))

    def take(self, state: FlowOptState) -> None:
        """Keeps the rows of a state that are to be chosen so far."""
        if self._selection == "last":
            merit = None
        else:
            merit = -state.residuals if state.scores is None else state.scores
            merit = torch.where(merit.isnan(), -torch.inf, merit)
        if self._best is None or merit is None:
            better = torch.ones(len(self.selected), dtype=torch.bool)
        else:
            better = merit > self._best
        if self.latents is None or bool(better.all()):
            self.latents, self.noise = state.latents, state.noise
        elif bool(better.any()):
            rows = better.to(state.latents.device).reshape(-1, *[1] * (state.latents.ndim - 1))
            self.latents = torch.where(rows, state.latents, self.latents)
            self.noise = torch.where(rows, state.noise, self.noise)
        if merit is not None:
            self._best = merit if self._best is None else torch.where(better, merit, self._best)
        self.selected = torch.where(better, state.iteration, self.selected)


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B,) peak signal-to-noise ratio in dB of two batches of pictures in [0, 1]; infinite where they are equal."""
    return -10 * (images.float() - others.float()).square().flatten(1).mean(1).log10()
