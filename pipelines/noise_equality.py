"""Gradient ascent of noise on the set where equality constraints hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count
from trimtab.optim.constrained import FirstOrderSQP

from .noise_optimizers import NoiseOptimizer, NoiseProblem

__all__ = ["EqualityAscent"]


class EqualityAscent(NoiseOptimizer):
    """Raises each sample's reward while its equality constraints become exact; see `FirstOrderSQP`.

    The last iterations only restore: the best point is moved by the shortest steps at which the linearized constraints
    hold, so that the result is feasible.

    Args:
        problem: what it starts from.
        step: length of the first step relative to the noise's norm.
        restoring: iterations at the end, at most half of all.
        reach: longest part of the first steps that restores the constraints, relative to the noise's norm.
        options: of `FirstOrderSQP`: `beta` and `nu`.

    Raises:
        ValueError: for a number out of range.
    """

    needs_gradient = True

    def __init__(
        self, problem: NoiseProblem, *, step: float = 0.1, restoring: int = 8, reach: float = 0.2, **options: Any
    ) -> None:
        super().__init__(problem)
        self.left = problem.num_steps
        self.restoring = min(checked_count("restoring", restoring, 0), problem.num_steps // 2)
        self.solvers = [FirstOrderSQP(row.double(), step=step, reach=reach, **options) for row in problem.latents]

    def ask(self) -> Tensor:
        """A trial of each sample: (B, 1, *latent_shape)."""
        self.left -= 1
        self._restored = self.left < self.restoring
        rows = [solver.restoration() if self._restored else solver.ask() for solver in self.solvers]
        self._asked = [row.float() for row in rows]
        shape = self.problem.latents.shape[1:]
        return torch.stack([row.view(1, *shape) for row in self._asked])

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """Takes nothing: `tell_constrained` does."""
        raise RuntimeError("`tell` knows no constraints; call `tell_constrained`")

    def tell_constrained(self, rewards: Tensor, gradients: Tensor, residuals: Tensor, jacobians: Tensor) -> None:
        """Takes or refuses each trial.

        Args:
            rewards: (B,), NaN where they are not finite and for samples that have ended.
            gradients: (B, *latent_shape).
            residuals: (B, m).
            jacobians: (B, m, *latent_shape).
        """
        rows = zip(self.solvers, self._asked, rewards.tolist(), gradients, residuals, jacobians, strict=True)
        for solver, asked, value, gradient, c, jacobian in rows:
            if value == value:
                moved = asked.double() if self._restored or solver.point is None else None
                solver.tell(-value, -gradient.double(), c.double(), jacobian.double(), moved)
