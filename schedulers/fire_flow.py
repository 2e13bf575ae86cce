"""The midpoint rule with the velocity of the step before as its predictor: FireFlow."""

from __future__ import annotations

import torch

from .base import FlowMatchSolver

__all__ = ["FlowMatchFireFlowInverseScheduler", "FlowMatchFireFlowScheduler"]


class FlowMatchFireFlowScheduler(FlowMatchSolver):
    """FireFlow (Deng et al., arXiv 2412.07517): a solver of order two at about one call of the network a step.

    From node s to the next, s + h, with p the midpoint velocity m of the step before, and v(x, s) at the first step:

        m = v(x + h/2 p, s + h/2),    x <- x + h m,    p <- m

    N + 1 calls: `timesteps` has the first node and then the middle of each step. As p is off by O(h), x + h/2 p is off
    by O(h^2), and a step by O(h^3), as with the midpoint rule itself. The inverse is the same rule along the nodes in
    the other order, `FlowMatchFireFlowInverseScheduler`.

    Args:
        as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.

    Example:
        >>> scheduler = FlowMatchFireFlowScheduler()
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
        >>> scheduler.timesteps.tolist()
        [1000.0, 750.0, 250.0]
    """

    def call_places(self, steps: int) -> list[float]:
        return [0.0, *(step + 0.5 for step in range(steps))]

    def may_start(self, call: int) -> bool:
        return call == 0

    def advance(self, call: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if call == 0:
            self._origin = sample
        else:
            self._origin = self._origin + (self._ends[call] - self._ends[call - 1]) * velocity
        if call + 1 == len(self._ends):
            return self._origin
        return self._origin + (self._ends[call + 1] - self._ends[call]) / 2 * velocity


class FlowMatchFireFlowInverseScheduler(FlowMatchFireFlowScheduler):
    """FireFlow's inversion: its rule from the sample to the noise.

    See `FlowMatchFireFlowScheduler`, which takes the noise back to the sample.

    Args:
        as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.
    """

    inverse = True
