"""Uni-Inv: one predicted and corrected step after the other, each at one call of the network."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .base import FlowMatchSolver

__all__ = ["FlowMatchUniInvScheduler"]


class FlowMatchUniInvScheduler(FlowMatchSolver):
    """Uni-Inv (UniEdit-Flow, Jiao et al., arXiv 2504.13109): the inversion whose error is of second order.

    Along the nodes 0 = s_0 < s_1 < ... < s_N of the stock schedule, h_i = s_i - s_{i-1}, from w = v(x, s_0):

        w <- v(x + h_i w, s_i),    x <- x + h_i w        for i = 1 ... N

    N + 1 calls of the network. x_i = x_{i-1} + h_i v(x_i, s_i) would undo Euler's step of the sampler exactly; this is
    one sweep of fixed-point iteration for it, begun at the velocity of the step before, so a step's error is O(h^3).
    Its sampler is `FlowMatchEulerDiscreteScheduler`. The official scheduler's `alpha`, running the first part of the
    schedule only, is `trimtab.schedulers.start_at` here.

    Args:
        zero_initial: begin at s_1 with w = 0, N calls: no call at s_0 = 0, where some networks were not trained.
        num_sweeps: sweeps at each node, >= 1, each one call; more of them come nearer to the exact inverse where the
            step is short against the flow's curvature, and diverge where it isn't.
        others: as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.

    Raises:
        TypeError: `zero_initial` is no bool or `num_sweeps` no integer.
        ValueError: `num_sweeps` is below 1.

    Example:
        >>> scheduler = FlowMatchUniInvScheduler(zero_initial=True)
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
        >>> scheduler.timesteps.tolist()
        [500.0, 1000.0]
    """

    inverse = True

    def __init__(self, *args: Any, zero_initial: bool = False, num_sweeps: int = 1, **kwargs: Any) -> None:
        if not isinstance(zero_initial, bool):
            raise TypeError(f"`zero_initial` is a {type(zero_initial).__name__}; takes True or False")
        if isinstance(num_sweeps, bool) or not isinstance(num_sweeps, int):
            raise TypeError(f"`num_sweeps` is a {type(num_sweeps).__name__}; takes an integer")
        if num_sweeps < 1:
            raise ValueError(f"`num_sweeps` is {num_sweeps}; takes an integer >= 1")
        super().__init__(*args, **kwargs)
        self.register_to_config(zero_initial=zero_initial, num_sweeps=num_sweeps)

    # `from_config` keeps what the signature names: the stock scheduler's parameters, whichever they are, and two.
    __init__.__signature__ = inspect.Signature(
        [
            *inspect.signature(FlowMatchSolver.__init__).parameters.values(),
            inspect.Parameter("zero_initial", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
            inspect.Parameter("num_sweeps", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=int),
        ]
    )

    def call_places(self, steps: int) -> list[float]:
        sweeps = [float(step) for step in range(1, steps + 1) for _ in range(self.config.num_sweeps)]
        return sweeps if self.config.zero_initial else [0.0, *sweeps]

    def may_start(self, call: int) -> bool:
        return call == 0

    def advance(self, call: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if self._origin is None:
            self._origin = sample
        sweep = call if self.config.zero_initial else call - 1  # -1 is the one at s_0
        if sweep < 0:
            return sample + (self._ends[1] - self._ends[0]) * velocity
        step, done = divmod(sweep + 1, self.config.num_sweeps)  # steps and, within the next one, sweeps behind us
        if done:
            return self._origin + (self._ends[step + 1] - self._ends[step]) * velocity
        self._origin = self._origin + (self._ends[step] - self._ends[step - 1]) * velocity
        if step + 1 == len(self._ends):
            return self._origin
        return self._origin + (self._ends[step + 1] - self._ends[step]) * velocity
