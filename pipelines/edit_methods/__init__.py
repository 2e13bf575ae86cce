"""Ways of editing a picture with a frozen flow model, one a file, and the table that `EditPipeline` reads.

Each needs nothing of a model but its velocity or its sampler. FlowOpt, which has iterates, is
`trimtab.pipelines.FlowOptPipeline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from trimtab.pipelines.flowopt_task import EditTask, counted

from .flowedit import flowedit
from .inversion import fireflow, ode_inversion, rf_solver, uni_inv
from .rf_inversion import controlled_invert, controlled_sample
from .sdedit import sdedit
from .velocity import Velocity, schedule_of, velocity_of

__all__ = [
    "METHODS",
    "EditMethod",
    "controlled_invert",
    "controlled_sample",
    "fireflow",
    "flowedit",
    "ode_inversion",
    "rf_solver",
    "schedule_of",
    "sdedit",
    "uni_inv",
    "velocity_of",
]

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class EditMethod:
    """A way of editing.

    Attributes:
        run: (task, generators, **options) to clean latents.
        options: its own options and their defaults.
        uses_source_prompt: it asks the model about the source under the source prompt.
        flow_only: it is one of flow models, not of diffusion models.
    """

    run: Callable[..., torch.Tensor]
    options: dict[str, Any]
    uses_source_prompt: bool = True
    flow_only: bool = True


def _velocities(task: EditTask) -> tuple[Velocity, Velocity, torch.Tensor]:
    """Velocities under the source prompt and the target prompt, whose calls are counted, and the schedule."""

    def counting(velocity: Velocity) -> Velocity:
        def call(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            with counted(task.pipe, task.calls):
                return velocity(x, sigma)

        return call

    sigmas = schedule_of(task.sample, task.target, task.start).sigmas
    flow = task.invert.replaced(scheduler=FlowMatchEulerDiscreteScheduler.from_config(task.sample.scheduler.config))
    return counting(velocity_of(flow)), counting(velocity_of(task.sample)), sigmas


def _run_flowedit(task: EditTask, generator: Generators, **options: Any) -> torch.Tensor:
    v_source, v_target, sigmas = _velocities(task)
    return flowedit(v_source, v_target, sigmas, task.target, generator, task.on_step, _mask_of(task), **options)


def _run_rf_inversion(
    task: EditTask, generator: Generators, *, gamma: float, eta: float, stop: float, decay: float
) -> torch.Tensor:
    v_source, v_target, sigmas = _velocities(task)
    y = task.target
    noise = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    told = task.on_step
    x = controlled_invert(v_source, sigmas, y, noise, told, gamma=gamma)
    back = None if told is None else lambda step, latents: told(len(sigmas) - 1 + step, latents)
    return controlled_sample(v_target, sigmas, x, y, _mask_of(task), back, eta=eta, stop=stop, decay=decay)


def _mask_of(task: EditTask) -> torch.Tensor | None:
    return None if task.path is None else task.path.mask.to(task.target)


def _without_noise(method: Callable[[EditTask], torch.Tensor]) -> Callable[[EditTask, Generators], torch.Tensor]:
    return lambda task, generator: method(task)


def _options_of(*functions: Callable[..., Any]) -> dict[str, Any]:
    return {
        parameter.name: parameter.default
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


METHODS: dict[str, EditMethod] = {
    "sdedit": EditMethod(sdedit, {}, uses_source_prompt=False, flow_only=False),
    "ode-inversion": EditMethod(_without_noise(ode_inversion), {}, flow_only=False),
    "uni-inv": EditMethod(_without_noise(uni_inv), {}),
    "rf-inversion": EditMethod(_run_rf_inversion, _options_of(controlled_invert, controlled_sample)),
    "rf-solver": EditMethod(_without_noise(rf_solver), {}),
    "fireflow": EditMethod(_without_noise(fireflow), {}),
    "flowedit": EditMethod(_run_flowedit, _options_of(flowedit)),
}
