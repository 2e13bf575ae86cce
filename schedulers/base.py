"""A flow's schedule with the network called at places of a solver's choosing, in either direction."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

__all__ = ["FlowMatchSolver"]


class FlowMatchSolver(FlowMatchEulerDiscreteScheduler):
    """What the solvers share: `FlowMatchEulerDiscreteScheduler`'s schedule, and calls of the network along it.

    The nodes of the schedule, s_0 > s_1 > ... > s_N = 0, are the stock scheduler's for the same config and the same
    arguments of `set_timesteps`: shift, dynamic shift by `mu`, terminal stretching, given `sigmas` or `timesteps`.
    A solver says at which nodes, or between which, it calls the network, and what it does with each velocity.
    `sigmas` and `timesteps` then hold one entry for each call, as pipelines and guiders expect, and `sigmas` the
    last node besides. An inverse solver goes through the same nodes from 0 to s_0.

    Samples are handed over in the dtype of the network's output; what a solver computes, and what it keeps between
    calls, is float32 at the least.

    Attributes:
        inverse: goes from the sample to the noise.
    """

    inverse = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Sets the schedule; the arguments are those of `FlowMatchEulerDiscreteScheduler`.

        Args:
            num_inference_steps: steps N of the sampler, >= 1.
            device: where the schedule goes.
            sigmas: the nodes before shifts, without the last one.
            mu: of the dynamic shift, where the config has one.
            timesteps: what the network is told at the nodes, without the last one.

        Raises:
            ValueError: the config asks for `stochastic_sampling`, or as in the stock scheduler.
        """
        if self.config.stochastic_sampling:
            raise ValueError(
                "`stochastic_sampling` is True in the scheduler's config; takes False: noise has no inverse"
            )
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        last = self.sigmas[-1:] * self.config.num_train_timesteps
        self._nodes = torch.stack([self.sigmas, torch.cat([self.timesteps, last.to(self.timesteps)])])
        self.skip(0)

    def skip(self, start: int) -> None:
        """Leaves out the `start` steps of the schedule at its noisy end: the flow between s_start and 0 remains.

        Args:
            start: number of steps, 0 <= start < N, counted from the full schedule.

        Raises:
            ValueError: `start` is out of this range.
        """
        steps = self._nodes.shape[1] - 1 - start
        if start < 0 or steps < 1:
            raise ValueError(f"`start` is {start}; takes 0 to {steps + start - 1} for a schedule of {steps + start}")
        nodes = self._nodes[:, start:]
        if self.inverse:
            nodes = nodes.flip(1)
        self._ends = nodes[0]
        places = torch.tensor(self.call_places(steps), device=nodes.device)
        before = places.long()
        between = torch.lerp(nodes[:, before], nodes[:, before + 1 - (before == steps).long()], places - before)
        self.sigmas = torch.cat([between[0], nodes[0, -1:]])
        self.timesteps = between[1]
        self._step_index = self._begin_index = None
        self._origin: torch.Tensor | None = None  # where a step that takes several calls began

    def call_places(self, steps: int) -> list[float]:
        """Where the network is called: 0.0 is the first node of the run, 0.5 half way to the second, and so on.

        Args:
            steps: of the run, >= 1.
        """
        return [float(step) for step in range(steps)]

    def advance(self, call: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample at which the network is called next, or the last one: Euler's step, if it isn't overridden.

        Args:
            call: number of the call in `timesteps`.
            velocity: the network's output there, float32 or float64.
            sample: its input there, likewise.
        """
        return sample + (self.sigmas[call + 1] - self.sigmas[call]) * velocity

    def may_start(self, call: int) -> bool:
        """Whether a run may begin at this call: it needs nothing from the one before."""
        return True

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """Takes one velocity.

        Args:
            model_output: the velocity at `sample` and `timestep`.
            timestep: one of `timesteps`; only a run's first counts, where no begin index is set.
            sample: the network's input, of any shape and floating dtype.
            return_dict: whether to give an output object; a tuple of one otherwise.

        Returns:
            The next input of the network, or at the end of the run the result, in the dtype of `model_output`.

        Raises:
            ValueError: `timestep` is an integer or none of `timesteps`, or a run begins within a step of the solver.
        """
        if self._step_index is None:
            self._init_step_index(timestep)
        precise = torch.promote_types(model_output.dtype, torch.float32)
        result = self.advance(self._step_index, model_output.to(precise), sample.to(precise)).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _init_step_index(self, timestep: Any) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"`timestep` is the integer {timestep}; takes one of the scheduler's `timesteps`")
        call = self._begin_index
        if call is None:
            calls = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
            if not len(calls):
                raise ValueError(f"`timestep` is {float(timestep)}; takes one of the scheduler's `timesteps`")
            call = int(calls[0])
        if not self.may_start(call):
            raise ValueError(
                f"a run of {type(self).__name__} can't begin at call {call}, within a step; "
                "takes trimtab.schedulers.start_at to leave out steps"
            )
        self._step_index = call
