"""The iterations of an edit or an inversion, and the choice of one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trimtab.optim.solvers import StepSizeReport, estimate_step_size, fixed_point

from .flowopt_output import FlowOptState
from .flowopt_task import EditTask

__all__ = ["ACCELERATIONS", "Chooser", "Iterations", "psnr"]

ACCELERATIONS = ("none", "anderson", "inverse")


class Iterations:
    """The states of one run, one after another; stop whenever you like.

    Args:
        task: what is edited.
        num_optimization_steps: updates K; K + 1 states.
        acceleration: "none" is the paper's update, "anderson" extrapolates it, and "inverse" subtracts the residual
            from the latents that are inverted, not from the noise: u <- u - (f(g(u)) - y) with the inverse scheduler
            g, extrapolated too. An iteration of it takes a pass through g and one through f.
        step_size: a number, one for each picture, or None: half the bound of the theorem, estimated from pairs; 1 for
            "inverse", where f(g(u)) is about u.
        solver_kwargs: further options of `trimtab.optim.fixed_point`.
        decode: latents to pictures, for the states.
        generator: of the pairs.

    Attributes:
        decode: latents to pictures.
        step_size: (B,) the step that is used; None before the first state.
        report: the estimate that it comes from, where there was one.
    """

    def __init__(
        self,
        task: EditTask,
        *,
        num_optimization_steps: int,
        acceleration: str,
        step_size: float | torch.Tensor | None,
        solver_kwargs: dict[str, Any],
        decode: Callable[[torch.Tensor], torch.Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self._task, self.decode = task, decode
        self._steps, self._acceleration, self._solver_kwargs = num_optimization_steps, acceleration, solver_kwargs
        self._generator, self._given = generator, step_size
        self.step_size: torch.Tensor | None = None
        self.report: StepSizeReport | None = None

    def __iter__(self) -> Iterator[FlowOptState]:
        task = self._task
        try:
            if self._acceleration == "inverse":
                yield from self._through_the_inverse()
                return
            x0 = task.inverted(task.target)
            f, value = task.flow, None
            if self._given is None:
                value = task.flow(x0)
                self.report = estimate_step_size(task.flow, x0, value=value, generator=self._generator)
                f = _knowing(task.flow, value)
            self._set_step_size(self._given if self.report is None else safe_step(self.report))
            for state in self._solve(f, x0, "none" if self._acceleration == "none" else "anderson"):
                yield self._state(state.iteration, state.value, state.x, state.residual)
        finally:
            task.release()

    def _through_the_inverse(self) -> Iterator[FlowOptState]:
        task, noise = self._task, {}

        def there_and_back(u: torch.Tensor) -> torch.Tensor:
            noise["x"] = task.inverted(u)
            return task.flow(noise["x"])

        self._set_step_size(1.0 if self._given is None else self._given)
        for state in self._solve(there_and_back, task.target, "anderson"):
            x = noise["x"]
            if bool(state.stopped.any()):  # a row that went back to its best point
                x = task.inverted(state.x)
            yield self._state(state.iteration, state.value, x, state.residual)

    def _solve(self, f: Callable[[torch.Tensor], torch.Tensor], x0: torch.Tensor, acceleration: str) -> Iterator[Any]:
        return fixed_point(
            f,
            self._task.target,
            x0,
            step_size=self.step_size,
            max_iterations=self._steps,
            acceleration=acceleration,
            **self._solver_kwargs,
        )

    def _set_step_size(self, value: float | torch.Tensor) -> None:
        self.step_size = torch.as_tensor(value, dtype=torch.float32).expand(len(self._task.target)).clone()

    def _state(self, iteration: int, latents: torch.Tensor, x: torch.Tensor, residuals: torch.Tensor) -> FlowOptState:
        return FlowOptState(iteration, latents, x, residuals, self._task.num_function_evaluations, _decode=self.decode)


def safe_step(report: StepSizeReport) -> torch.Tensor:
    """(B,) half the bound of each row; of a row without one, half the least of the others, or 0.01."""
    bound = report.bound
    known = bound[~bound.isnan()]
    fallback = known.min() if len(known) else torch.tensor(0.02)
    return 0.5 * torch.where(bound.isnan(), fallback, bound)


class Chooser:
    """Keeps the iterate that `selection` wants, and the curves that it was chosen by.

    Args:
        selection: "last", "residual" (the least: of an inversion) or a function of (images, prompts) to (B,) scores,
            the highest wins; a reward of `trimtab.rewards` is one.
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


def _knowing(f: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`f`, whose first value has been computed before."""
    known = [value]
    return lambda x: known.pop() if known else f(x)
