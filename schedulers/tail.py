"""The clean end of a schedule: a sampler, or its inverse, without its first steps."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch

from .base import FlowMatchSolver

__all__ = ["start_at"]


def start_at(scheduler: Any, start: int) -> Any:
    """A copy of a scheduler that makes its full schedule and leaves out the `start` steps at the noisy end.

    In a stock pipeline's call with `num_inference_steps=N` it runs N - start steps: a sampler takes latents that lie
    on step `start` of the schedule to the end of it, an inverse scheduler takes clean ones there. Handing a pipeline
    the rest of a schedule as `sigmas` doesn't do the same, as shifts would be applied to it a second time.

    Args:
        scheduler: of Diffusers or of this package: a sampler with descending `timesteps`, or one with ascending
            `timesteps` that inverts it. It is left as it is.
        start: steps to leave out of the schedule that each `set_timesteps` makes, >= 0. A scheduler that
            `start_at` gave is cut anew, not further.

    Returns:
        The copy. Its config is the scheduler's: `start` is not saved with it.

    Raises:
        TypeError: `start` is no integer.
        ValueError: `start` is negative; at `set_timesteps`, if no step is left.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> tail = start_at(FlowMatchEulerDiscreteScheduler(shift=3.0), 1)
        >>> tail.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        >>> [round(value, 3) for value in tail.sigmas.tolist()]
        [0.9, 0.75, 0.5, 0.0]
    """
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"`start` is a {type(start).__name__}; takes an integer")
    if start < 0:
        raise ValueError(f"`start` is {start}; takes an integer >= 0")
    tail = copy.copy(scheduler)
    for name in [name for name, value in vars(tail).items() if inspect.isroutine(value)]:
        delattr(tail, name)  # a method put on the original acts on the original
    full = tail.set_timesteps

    @functools.wraps(full)  # pipelines look at the parameters
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        full(*args, **kwargs)
        if isinstance(tail, FlowMatchSolver):
            tail.skip(start)
        else:
            _cut(tail, start)

    tail.set_timesteps = set_timesteps
    return tail


def _cut(scheduler: Any, start: int) -> None:
    """Cuts the schedule of a scheduler of Diffusers, whose steps take `order` entries each."""
    timesteps, count = scheduler.timesteps, start * scheduler.order
    if count >= len(timesteps):
        steps = -(-len(timesteps) // scheduler.order)
        raise ValueError(f"`start` is {start}; takes 0 to {steps - 1} for a schedule of {steps}")
    inverse = len(timesteps) > 1 and bool(timesteps[0] < timesteps[-1])
    keep = slice(0, len(timesteps) - count) if inverse else slice(count, None)
    scheduler.timesteps = timesteps[keep]
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) == len(timesteps) + 1:  # those of a step: its ends
        scheduler.sigmas = sigmas[: keep.stop + 1] if inverse else sigmas[keep]
