"""The explicit midpoint rule, in both directions: RF-Solver."""

from __future__ import annotations

import torch

from .base import FlowMatchSolver

__all__ = ["FlowMatchMidpointInverseScheduler", "FlowMatchMidpointScheduler"]


class FlowMatchMidpointScheduler(FlowMatchSolver):
    """RF-Solver (Wang et al., "Taming Rectified Flow for Inversion and Editing", arXiv 2411.04746), of order two.

    From node s to the next, s + h:

        p = v(x, s),    m = v(x + h/2 p, s + h/2),    x <- x + h p + h^2/2 (m - p) / (h/2) = x + h m

    The paper expands the solution to second order and takes the velocity's derivative by a finite difference over half
    a step, which is the explicit midpoint rule. Two calls of the network a step: `timesteps` has 2 N entries, and
    `order` is 2. The inverse is the same rule along the nodes in the other order,
    `FlowMatchMidpointInverseScheduler`.

    Args:
        as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.

    Example:
        >>> scheduler = FlowMatchMidpointScheduler()
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
        >>> scheduler.timesteps.tolist()
        [1000.0, 750.0, 500.0, 250.0]
    """

    order = 2

    def call_places(self, steps: int) -> list[float]:
        return [call / 2 for call in range(2 * steps)]

    def may_start(self, call: int) -> bool:
        return call % 2 == 0

    def advance(self, call: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        step, second = divmod(call, 2)
        if not second:
            self._origin = sample
            return sample + (self.sigmas[call + 1] - self.sigmas[call]) * velocity
        return self._origin + (self._ends[step + 1] - self._ends[step]) * velocity


class FlowMatchMidpointInverseScheduler(FlowMatchMidpointScheduler):
    """RF-Solver's inversion: the explicit midpoint rule from the sample to the noise.

    See `FlowMatchMidpointScheduler`, which takes the noise back to the sample, both with an error of O(1/N^2).

    Args:
        as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.
    """

    inverse = True
