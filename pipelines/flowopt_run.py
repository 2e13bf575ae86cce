"""The iterations of an edit or an inversion, and the choice of one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from trimtab.optim.solvers import StepSizeReport, estimate_step_size, fixed_point
from trimtab.optim.solvers.fixed_point import check_solver_options

from .flowopt_choice import Chooser
from .flowopt_locality import Locality, checked_locality
from .flowopt_mask import check_blend, set_in
from .flowopt_output import FlowOptPipelineOutput, FlowOptState, as_output_type
from .flowopt_task import EditTask, prepare_edit
from .images import load_images

__all__ = ["ACCELERATIONS", "OUTPUT_TYPES", "Iterations", "Run", "begin"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
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
        spread: with "none" and None, half the bound is shared out among the updates.
        locality: of `Locality`; None is the paper's residual.
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
        spread: bool = False,
        locality: float | None = None,
    ) -> None:
        self._parts = max(1, num_optimization_steps) if spread and acceleration == "none" else 1
        self._task, self.decode = task, decode
        self._steps, self._acceleration, self._solver_kwargs = num_optimization_steps, acceleration, solver_kwargs
        self._generator, self._given = generator, step_size
        self._locality = None if locality is None else Locality(locality, task.target, task.path)
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
                # In so many dimensions a random pair's ratio is an average already: one of each kind will do.
                self.report = estimate_step_size(
                    task.flow, x0, value=value, local_points=1, global_points=1, generator=self._generator
                )
                f = _knowing(task.flow, value)
            self._set_step_size(self._given if self.report is None else safe_step(self.report) / self._parts)
            states = self._solve(f, x0, "none" if self._acceleration == "none" else "anderson")
            del x0, value
            for state in states:
                yield self._state(state.iteration, state.value, state.x, state.residual)
                del state  # its latents needn't live through the next pass
        finally:
            task.release()

    def _through_the_inverse(self) -> Iterator[FlowOptState]:
        task, noise = self._task, {}

        def there_and_back(u: torch.Tensor) -> torch.Tensor:
            noise["x"] = task.inverted(u)
            return task.flow(noise["x"])

        self._set_step_size(1.0 if self._given is None else self._given)
        shown: torch.Tensor | None = None
        for state in self._solve(there_and_back, task.target, "anderson"):
            new = state.improved.to(noise["x"].device).reshape(-1, *[1] * (noise["x"].ndim - 1))
            shown = noise["x"] if shown is None else torch.where(new, noise["x"], shown)
            yield self._state(state.iteration, state.value, shown, state.residual)
            del state

    def _solve(self, f: Callable[[torch.Tensor], torch.Tensor], x0: torch.Tensor, acceleration: str) -> Iterator[Any]:
        local = self._locality
        return fixed_point(
            f if local is None else lambda x: local.watch(f(x)),
            self._task.target,
            x0,
            step_size=self.step_size,
            max_iterations=self._steps,
            acceleration=acceleration,
            project=None if local is None else local.weighted,
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


def _knowing(f: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`f`, whose first value has been computed before."""
    known = [value]
    return lambda x: known.pop() if known else f(x)


class Run:
    """A run with the choice of its result: iterate it for scored states, or `finish` it.

    Args:
        task: what is edited.
        iterations: its states.
        chooser: takes them.
        steps: updates that are planned, for the progress bar.
        inversion: the result's latents are the noise.
    """

    def __init__(
        self, task: EditTask, iterations: Iterations, chooser: Chooser, *, steps: int, inversion: bool
    ) -> None:
        self._task, self._iterations, self._chooser = task, iterations, chooser
        self._steps, self._inversion = steps, inversion

    def __iter__(self) -> Iterator[FlowOptState]:
        for state in self._iterations:
            yield self._chooser.scored(state)
            del state

    def finish(
        self,
        *,
        keep_history: bool,
        callback: Callable[[Any, int, FlowOptState], bool | None] | None,
        output_type: str,
        return_dict: bool,
    ) -> FlowOptPipelineOutput | tuple[Any, ...]:
        """Runs it to its end, or to where the callback ends it, and gives the result."""
        task, chooser = self._task, self._chooser
        states: list[FlowOptState] = []
        with task.pipe.progress_bar(total=self._steps + 1) as progress:
            for state in self:
                chooser.take(state)
                states.append(state.stored(latents=keep_history))
                progress.update()
                stop = callback is not None and callback(task.pipe, state.iteration, state)
                del state  # its latents needn't live through the next pass
                if stop:
                    break
        images = chooser.latents
        if output_type != "latent":
            images = as_output_type(self._iterations.decode(chooser.latents), output_type)
        task.release()
        scored = states[0].scores is not None
        output = FlowOptPipelineOutput(
            images=images,
            latents=chooser.noise if self._inversion else chooser.latents,
            residuals=torch.stack([state.residuals for state in states]),
            num_function_evaluations=states[-1].num_function_evaluations,
            step_size=self._iterations.step_size,
            selected=chooser.selected,
            history=states if keep_history else None,
            scores=torch.stack([state.scores for state in states]) if scored else None,
            similarities=torch.stack([state.similarities for state in states]) if scored else None,
        )
        return output if return_dict else output.to_tuple()


def begin(
    pipe: Any,
    image: Any,
    *,
    num_optimization_steps: int,
    step_size: float | torch.Tensor | None,
    acceleration: str,
    selection: Any,
    generator: torch.Generator | None,
    solver_kwargs: dict[str, Any] | None,
    output_type: str = "pil",
    blend: str | None = None,
    locality: float | None = None,
    inversion: bool = False,
    **task_options: Any,
) -> Run:
    """Checks a run's arguments, prepares what is edited and gives the run; no iteration is made.

    Args:
        pipe: a pipeline of a family in the table.
        image: as for the editing pipelines' call.
        num_optimization_steps: as for the editing pipelines' call, like all others.
        inversion: the source prompt is the prompt, and the least residual is chosen.
        task_options: of `prepare_edit`.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of the wrong type.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` is {output_type!r}; takes one of {', '.join(OUTPUT_TYPES)}")
    if acceleration not in ACCELERATIONS:
        raise ValueError(f"`acceleration` is {acceleration!r}; takes one of {', '.join(ACCELERATIONS)}")
    if not (callable(selection) or selection == "last" or inversion):
        raise ValueError(f"`selection` is {selection!r}; takes 'last' or a function of images and prompts")
    check_blend(blend)
    if checked_locality(locality) is not None and acceleration != "none":
        raise ValueError(f"`locality` is {locality} with `acceleration` {acceleration!r}; takes 'none' with it")
    if step_size is not None and not bool((torch.as_tensor(step_size) > 0).all()):
        raise ValueError(f"`step_size` is {step_size}; takes None or a number > 0")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` is a {type(generator).__name__}; takes a torch.Generator or None")
    solver_options = _solver_options(num_optimization_steps, solver_kwargs)
    images = load_images(image)
    if step_size is not None and torch.as_tensor(step_size).numel() not in (1, len(images)):
        shape = tuple(torch.as_tensor(step_size).shape)
        raise ValueError(f"`step_size` has shape {shape}; takes a number or one for each of {len(images)} pictures")
    task = prepare_edit(pipe, images, local=locality is not None, **task_options)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            images = task.sample.decode(latents.to(pipe._execution_device)).float().cpu()
        return set_in(images, task.pictures, task.mask, blend)

    iterations = Iterations(
        task,
        num_optimization_steps=num_optimization_steps,
        acceleration=acceleration,
        step_size=step_size,
        solver_kwargs=solver_options,
        decode=decode,
        generator=generator,
        spread=not inversion,
        locality=locality,
    )
    chooser = Chooser(selection, task.prompts, task.pictures)
    return Run(task, iterations, chooser, steps=num_optimization_steps, inversion=inversion)


def _solver_options(steps: int, given: dict[str, Any] | None) -> dict[str, Any]:
    options = {"memory": 3, "regularization": 1e-2, "step_limit": 8.0, "tolerance": None}
    for name in given or {}:
        if name not in options:
            raise TypeError(f"`solver_kwargs` has `{name}`; takes {', '.join(options)}")
    options |= given or {}
    check_solver_options(steps, "none", **options, name="num_optimization_steps")
    return options
