"""The loop of noise optimization: propose, make pictures, score them, keep each sample's best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise_objective import Evaluation, NoiseObjective
from .noise_optimizers import NoiseOptimizer

__all__ = ["NoiseOptimizationState", "NoiseRun"]


@dataclass(frozen=True)
class NoiseOptimizationState:
    """What an iteration gave, and the best so far. Tensors of numbers lie on the CPU.

    Attributes:
        step: k, from 0.
        rewards: (B,) of this iteration, its best candidate's; NaN for samples that have ended.
        terms: the reward's parts by name, each (B,).
        monitor: (B,) of the held-out reward, if there is one.
        norms: (B,) the noise's norm over sqrt(d - 1), where noise is likeliest.
        improved: (B,) bool, whether this iteration's picture is a sample's new best.
        images: (B, 3, H, W) in [0, 1]; of samples that have ended, their best ones.
        best_rewards: (B,).
        best_step: (B,) int64.
        best_images: (B, 3, H, W).
        best_latents: (B, *latent_shape) float32, the best pictures' noise.
        stopped: for each sample why it has ended, or None.
        num_evaluations: pictures made for each sample so far.
        violations: (B,) of the best pictures, 0 where they are feasible; None without constraints.
        kkt: (B,) of this iteration's noise under equality constraints, where it has gradients.
    """

    step: int
    rewards: Tensor
    terms: dict[str, Tensor]
    monitor: Tensor | None
    norms: Tensor
    improved: Tensor
    images: Tensor
    best_rewards: Tensor
    best_step: Tensor
    best_images: Tensor
    best_latents: Tensor
    stopped: tuple[str | None, ...]
    num_evaluations: int
    violations: Tensor | None = None
    kkt: Tensor | None = None


class NoiseRun:
    """Iterates over the states of a run.

    Args:
        objective: what noise is worth.
        optimizer: what proposes it.
        num_steps: iterations, >= 1.
        monitor_patience: a sample ends once its held-out reward has had no new best for so many iterations, and its
            result is the best up to there; None never ends one.
        evaluating: entered around each evaluation with whether it takes gradients.
    """

    def __init__(
        self,
        objective: NoiseObjective,
        optimizer: NoiseOptimizer,
        num_steps: int,
        *,
        monitor_patience: int | None = None,
        evaluating: Callable[[bool], AbstractContextManager[object]] = lambda with_gradient: nullcontext(),
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.num_steps = num_steps
        self.monitor_patience = monitor_patience
        self.evaluating = evaluating

    def __iter__(self) -> Iterator[NoiseOptimizationState]:
        best: _Best | None = None
        for step in range(self.num_steps):
            last = step == self.num_steps - 1
            proposals = self.optimizer.ask()
            best = best or _Best(len(proposals), self.monitor_patience)
            with_gradient = self.optimizer.needs_gradient and not last
            rows = best.active
            with self.evaluating(with_gradient):
                evaluation = self._evaluate(proposals, rows, with_gradient)
            state, rewards, gradients = best.take(step, proposals, evaluation, rows)
            yield state
            if not best.active:
                return
            if not last and evaluation.residuals is None:
                self.optimizer.tell(rewards, gradients)
            elif not last:
                told = (
                    _by_sample(values, rows, len(proposals)) for values in (evaluation.residuals, evaluation.jacobians)
                )
                going = state.rewards.clone()
                going[[row for row, reason in enumerate(state.stopped) if reason is not None]] = float("nan")
                self.optimizer.tell_constrained(going, gradients.squeeze(1), *told)

    def _evaluate(self, proposals: Tensor, rows: list[int], with_gradient: bool) -> Evaluation:
        candidates = proposals.shape[1]
        index = [row for row in rows for _ in range(candidates)]
        return self.objective(proposals[rows].flatten(0, 1), index, with_gradient=with_gradient)


class _Best:
    """Each sample's best picture so far, and who goes on."""

    def __init__(self, batch: int, patience: int | None) -> None:
        self.patience = patience
        self.rewards = torch.full((batch,), float("-inf"))
        self.step = torch.zeros(batch, dtype=torch.long)
        self.stopped: list[str | None] = [None] * batch
        self.images: Tensor | None = None
        self.latents: Tensor | None = None
        self.evaluations = 0
        self.scores = self.rewards.double()
        self.violations: Tensor | None = None
        self._watched = torch.full((batch,), float("-inf"))
        self._watched_step = torch.zeros(batch, dtype=torch.long)
        self._watched_best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def active(self) -> list[int]:
        return [row for row, reason in enumerate(self.stopped) if reason is None]

    def take(
        self, step: int, proposals: Tensor, evaluation: Evaluation, rows: list[int]
    ) -> tuple[NoiseOptimizationState, Tensor, Tensor | None]:
        """This iteration's state, and what the optimizer is told."""
        batch, candidates = proposals.shape[:2]
        self.evaluations += candidates
        rewards = torch.full((batch, candidates), float("nan"))
        rewards[rows] = evaluation.rewards.view(len(rows), candidates)
        told, violations = _told(rewards, evaluation.violations, rows)
        chosen = told.argmax(1)
        # Of each active sample, its best candidate's row in the evaluation.
        picked = torch.tensor([i * candidates + int(chosen[row]) for i, row in enumerate(rows)])
        images, latents = self._present(proposals, evaluation, rows, picked, chosen)
        now = rewards[torch.arange(batch), chosen]
        monitor = _spread(evaluation.monitor, rows, picked, batch)

        score = told[torch.arange(batch), chosen].double()
        improved = score > self.scores  # False where it is not finite
        if step == 0 and not improved.any():
            raise FloatingPointError("the reward at iteration 0 is not finite for any sample: nothing to improve on")
        if step == 0:
            self.images, self.latents = images.clone(), latents.clone()
        self._keep(improved, now, step, images, latents)
        self.scores = torch.where(improved, score, self.scores)
        if violations is not None:
            now_violated = violations[torch.arange(batch), chosen]
            before = now_violated if self.violations is None else self.violations
            self.violations = torch.where(improved, now_violated, before)
        gradients = self._gradients(evaluation, rows, proposals)
        self._stop(step, now, monitor, gradients, rows)
        told[[row for row in range(batch) if self.stopped[row] is not None]] = float("-inf")
        state = NoiseOptimizationState(
            step=step,
            rewards=now,
            terms={name: _spread(term, rows, picked, batch) for name, term in evaluation.terms.items()},
            monitor=monitor,
            norms=_relative_norms(latents),
            improved=improved,
            images=images,
            best_rewards=self.rewards.clone(),
            best_step=self.step.clone(),
            best_images=self.images,
            best_latents=self.latents,
            stopped=tuple(self.stopped),
            num_evaluations=self.evaluations,
            violations=self.violations,
            kkt=_spread(evaluation.kkt, rows, picked, batch),
        )
        return state, told, gradients

    def _present(
        self, proposals: Tensor, evaluation: Evaluation, rows: list[int], picked: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        images = evaluation.images[picked.to(evaluation.images.device)]
        latents = proposals[torch.arange(len(proposals)), chosen]
        if len(rows) == len(proposals):
            return images, latents
        all_images, all_latents = self.images.clone(), self.latents.clone()
        all_images[rows], all_latents[rows] = images, latents[rows]
        return all_images, all_latents

    def _keep(self, improved: Tensor, now: Tensor, step: int, images: Tensor, latents: Tensor) -> None:
        self.rewards = torch.where(improved, now, self.rewards)
        self.step = torch.where(improved, step, self.step)
        # New tensors: what an earlier state holds stays as it was.
        self.images = _where(improved, images, self.images)
        self.latents = _where(improved, latents, self.latents)

    def _gradients(self, evaluation: Evaluation, rows: list[int], proposals: Tensor) -> Tensor | None:
        if evaluation.gradients is None:
            return None
        gradients = torch.zeros_like(proposals)
        gradients[rows] = evaluation.gradients.view_as(proposals[rows])
        return gradients

    def _stop(self, step: int, now: Tensor, monitor: Tensor | None, gradients: Tensor | None, rows: list[int]) -> None:
        for row in rows:
            if not bool(torch.isfinite(now[row])):
                self.stopped[row] = f"the reward at iteration {step} is not finite"
        if gradients is not None:
            finite = torch.isfinite(gradients.flatten(1)).all(1).cpu()
            for row in rows:
                if not finite[row] and self.stopped[row] is None:
                    self.stopped[row] = f"the gradient at iteration {step} is not finite"
            ended = [row for row in range(len(now)) if self.stopped[row] is not None]
            gradients[ended] = 0.0
        if monitor is None or self.patience is None:
            return
        better = monitor > self._watched
        self._watched = torch.where(better, monitor, self._watched)
        self._watched_step = torch.where(better, step, self._watched_step)
        best = (self.rewards, self.step, self.images, self.latents)
        before = self._watched_best or best
        self._watched_best = tuple(_where(better, new, old) for new, old in zip(best, before, strict=True))
        ended = torch.zeros_like(better)
        for row in rows:
            if self.stopped[row] is None and step - int(self._watched_step[row]) >= self.patience:
                ended[row] = True
                self.stopped[row] = f"the held-out reward has not risen since iteration {int(self._watched_step[row])}"
        if ended.any():  # what came after that iteration doesn't count
            self.rewards, self.step, self.images, self.latents = (
                _where(ended, then, now) for then, now in zip(self._watched_best, best, strict=True)
            )


INFEASIBLE = -1e6
"""What an infeasible candidate is told to be worth, before its violation is taken off."""


def _told(rewards: Tensor, violations: Tensor | None, rows: list[int]) -> tuple[Tensor, Tensor | None]:
    """What an optimizer is told of rewards (B, K), and their violations shaped alike."""
    told = rewards.nan_to_num(nan=float("-inf"))
    if violations is None:
        return told, None
    spread = torch.full_like(rewards, float("inf"))
    spread[rows] = violations.view(len(rows), -1)
    # Double, so that small differences of violations are not lost beside the offset.
    told = told.double()
    worth = torch.where(spread > 0, INFEASIBLE - spread.double(), told)
    return torch.where(torch.isfinite(told), worth, told), spread


def _spread(values: Tensor | None, rows: list[int], picked: Tensor, batch: int) -> Tensor | None:
    if values is None:
        return None
    result = torch.full((batch,), float("nan"))
    result[rows] = values[picked]
    return result


def _by_sample(values: Tensor, rows: list[int], batch: int) -> Tensor:
    result = values.new_zeros(batch, *values.shape[1:])
    result[rows] = values
    return result


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.to(new.device).view(-1, *[1] * (new.ndim - 1)), new, old)


def _relative_norms(latents: Tensor) -> Tensor:
    likeliest = max(latents[0].numel() - 1, 1) ** 0.5
    return (torch.linalg.vector_norm(latents.float().flatten(1), dim=1) / likeliest).cpu()
