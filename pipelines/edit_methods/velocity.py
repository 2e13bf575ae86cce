"""A stock pipeline's guided velocity as a function v(x, sigma), and the schedule that it would sample with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from trimtab.pipelines.generation_map import GenerationMap
from trimtab.schedulers import start_at

__all__ = ["Velocity", "schedule_of", "velocity_of"]

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Reached(BaseException):
    """Leaves a stock call when its schedule is set; no handler of ordinary errors may take it for one."""


class _OneCall(FlowMatchEulerDiscreteScheduler):
    """A schedule of one call of the network, whose `step` gives the velocity in place of a sample."""

    place: torch.Tensor  # sigma of the call, 0-dim

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        sigma = self.place.to(device).reshape(1)
        self.sigmas = torch.cat([sigma, torch.zeros_like(sigma)])
        self.timesteps = sigma * self.config.num_train_timesteps
        self.num_inference_steps = 1
        self._step_index = self._begin_index = None

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *, return_dict: bool = True
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        self._step_index = 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=model_output) if return_dict else (model_output,)


def velocity_of(f: GenerationMap) -> Velocity:
    """The velocity that a map's pipeline hands to its scheduler: guided, and with the family's sign.

    Each evaluation is a stock call of one step, so whatever a family does to its inputs, its timestep and its output
    is done here as there.

    Args:
        f: a map to latents, of a pipeline with a flow's scheduler.

    Returns:
        v(x, sigma): x (B, *latent_shape) float32, the latents at level sigma, a 0-dim tensor in [0, 1]; the result is
        shaped like x, the derivative of x by sigma.

    Raises:
        ValueError: the scheduler is none of a flow.
    """
    scheduler = f.pipe.scheduler if f.scheduler is None else f.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"`scheduler` is a {type(scheduler).__name__}; takes a FlowMatchEulerDiscreteScheduler")
    once = _OneCall.from_config(scheduler.config)
    call = f.replaced(scheduler=once)

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        once.place = torch.as_tensor(sigma, dtype=torch.float32)
        return call(x)

    return velocity


def schedule_of(f: GenerationMap, latents: torch.Tensor, start: int) -> Any:
    """The scheduler of a map with its schedule set as in the stock call, without its first `start` steps.

    Args:
        f: a map to latents with a scheduler of its own.
        latents: a batch for it; nothing is computed from them.
        start: steps to leave out.

    Returns:
        A copy of the scheduler with `timesteps` and, for a flow, `sigmas` (steps + 1,), ending in 0.
    """
    scheduler = start_at(f.scheduler, start)
    inner = scheduler.set_timesteps

    @functools.wraps(inner)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        raise _Reached(scheduler.timesteps, getattr(scheduler, "sigmas", None))

    scheduler.set_timesteps = set_timesteps
    try:
        f.replaced(scheduler=scheduler)(latents)
    except _Reached as reached:
        scheduler.timesteps, sigmas = reached.args  # the call put everything back that it had set
        if sigmas is not None:
            scheduler.sigmas = sigmas
        return scheduler
    raise RuntimeError(f"{type(f.pipe).__name__} never set its timesteps")
