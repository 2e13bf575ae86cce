"""A flow's sampler as a policy: Gaussian transitions whose log-probabilities are exact."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from trimtab.optim.policy.log_probs import gaussian_log_prob

from .base import FlowMatchSolver

__all__ = ["FlowMatchStochasticScheduler", "FlowTransition", "flow_transition"]

KINDS = ("sde", "ddim")


@dataclass
class FlowMatchStochasticSchedulerOutput(BaseOutput):
    """What a step gives.

    Attributes:
        prev_sample: the next sample.
        log_prob: (B,), its log-density given the sample before; None where the step has no noise.
        mean: of the transition.
        std: of the transition, a number.
    """

    prev_sample: torch.Tensor
    log_prob: torch.Tensor | None
    mean: torch.Tensor
    std: float


@dataclass(frozen=True)
class FlowTransition:
    """One step of a run, without history.

    Attributes:
        timestep: what the network was told.
        sample: its input (B, ...).
        prev_sample: what came next (B, ...).
        log_prob: (B,) of that under the policy of the run.
    """

    timestep: torch.Tensor
    sample: torch.Tensor
    prev_sample: torch.Tensor
    log_prob: torch.Tensor


def flow_transition(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float = 0.7,
    kind: str = "sde",
    first_sigma: float | None = None,
) -> tuple[torch.Tensor, float]:
    """Mean and standard deviation of one transition from noise level sigma to a lower one.

    "sde" is a step of Euler and Maruyama of the stochastic equation that has the flow's marginals, d = sigma_next -
    sigma < 0, w = noise_level sqrt(sigma / (1 - sigma)):

        mean = x (1 + w^2 d / (2 sigma)) + v (1 + w^2 (1 - sigma) / (2 sigma)) d,    std = w sqrt(-d)

    "ddim" redraws a part of the predicted noise, x0 = x - sigma v, e = x + (1 - sigma) v:

        std = noise_level sigma' sqrt(1 - ((1 - sigma) sigma' / ((1 - sigma') sigma))^2)
        mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) e

    and has no noise in the step to 0, so that pictures have none either.

    Sources: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", arXiv 2505.05470; Song et al.,
    "Denoising Diffusion Implicit Models", arXiv 2010.02502, equation (16) in a flow's parametrization.

    Args:
        velocity: v(x, sigma), a tensor.
        sample: x, of its shape.
        sigma: in (0, 1].
        sigma_next: in [0, sigma).
        noise_level: >= 0, for "ddim" <= 1; 0 is Euler's step of the flow itself.
        kind: "sde" or "ddim".
        first_sigma: stands for sigma in 1 - sigma where sigma is 1, which w divides by; None is (1 + sigma_next) / 2.

    Returns:
        The mean, of the inputs' promoted dtype, with a graph to `velocity`; the standard deviation.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> mean, std = flow_transition(torch.ones(1), torch.zeros(1), 0.5, 0.25, noise_level=0.0)
        >>> mean.tolist(), std
        ([-0.25], 0.0)
    """
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"`sigma` is {sigma} and `sigma_next` {sigma_next}; takes 0 <= sigma_next < sigma <= 1")
    _check_noise(noise_level, kind)
    if kind == "ddim":
        kept = (1 - sigma) * sigma_next / ((1 - sigma_next) * sigma)
        std = noise_level * sigma_next * max(1 - kept**2, 0.0) ** 0.5
        clean, noise = sample - sigma * velocity, sample + (1 - sigma) * velocity
        return (1 - sigma_next) * clean + max(sigma_next**2 - std**2, 0.0) ** 0.5 * noise, std
    step = sigma_next - sigma
    rest = 1 - sigma
    if rest < 1e-6:
        rest = 1 - ((1 + sigma_next) / 2 if first_sigma is None else first_sigma)
    w2 = noise_level**2 * sigma / rest
    mean = sample * (1 + w2 * step / (2 * sigma)) + velocity * (1 + w2 * (1 - sigma) / (2 * sigma)) * step
    return mean, (w2 * -step) ** 0.5


class FlowMatchStochasticScheduler(FlowMatchSolver):
    """The flow's sampler with noise in each step: same marginals, and a policy with log-probabilities.

    The nodes are the stock schedule's; between them the transition is `flow_transition`. What reinforcement learning
    calls an action is the next sample, and log pi its Gaussian log-density, summed over the coordinates.

    Randomness is the generator handed to `step`, or to `recording`, in which a stock pipeline's own loop runs:

        with scheduler.recording(generator) as trajectory:
            images = pipe(prompt, ...).images            # trajectory: one FlowTransition for each step with noise
        log_probs = scheduler.log_prob(velocity, t.timestep, t.sample, t.prev_sample)    # with a graph to the network

    Args:
        noise_level: a >= 0; 0.7 is Flow-GRPO's. For "ddim" in [0, 1].
        transition: "sde" or "ddim".
        others: as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.

    Raises:
        TypeError: `noise_level` is no number.
        ValueError: a value out of range.

    Example:
        >>> scheduler = FlowMatchStochasticScheduler()
        >>> scheduler.set_timesteps(4)
        >>> x = torch.ones(2, 3)
        >>> out = scheduler.step(x, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0))
        >>> out.log_prob.shape
        torch.Size([2])
    """

    def __init__(self, *args: Any, noise_level: float = 0.7, transition: str = "sde", **kwargs: Any) -> None:
        _check_noise(noise_level, transition)
        super().__init__(*args, **kwargs)
        self.register_to_config(noise_level=noise_level, transition=transition)
        self._generator: Any = None
        self._trajectory: list[FlowTransition] | None = None

    # `from_config` keeps what the signature names: the stock scheduler's parameters, whichever they are, and two.
    __init__.__signature__ = inspect.Signature(
        [
            *inspect.signature(FlowMatchSolver.__init__).parameters.values(),
            inspect.Parameter("noise_level", inspect.Parameter.KEYWORD_ONLY, default=0.7, annotation=float),
            inspect.Parameter("transition", inspect.Parameter.KEYWORD_ONLY, default="sde", annotation=str),
        ]
    )

    @contextlib.contextmanager
    def recording(self, generator: torch.Generator | Sequence[torch.Generator]) -> Iterator[list[FlowTransition]]:
        """Steps take their noise from here, and put their transitions in the list that this gives.

        Args:
            generator: one for the batch, or a list of one for each row.
        """
        self._generator, self._trajectory = generator, []
        try:
            yield self._trajectory
        finally:
            self._generator = self._trajectory = None

    def transition(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Mean and standard deviation of the step from `sample` at `timestep`; the mean has `model_output`'s graph.

        Raises:
            ValueError: `timestep` is none of `timesteps`.
        """
        calls = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if not len(calls):
            raise ValueError(f"`timestep` is {float(timestep)}; takes one of the scheduler's `timesteps`")
        return self._mean_and_std(int(calls[0]), model_output, sample)

    def log_prob(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        prev_sample: torch.Tensor,
        *,
        reduce: str = "sum",
    ) -> torch.Tensor:
        """Log-density of a transition that was drawn before, with a graph to the network.

        Args:
            model_output: the velocity at `sample` and `timestep`.
            timestep: one of `timesteps`.
            sample: (B, ...).
            prev_sample: (B, ...), what came next.
            reduce: "sum" over the coordinates, or "mean" for the ratios of DDPO and Flow-GRPO.

        Returns:
            (B,), float32 at the least.

        Raises:
            ValueError: `timestep` is none of `timesteps`, or its step has no noise and so no density.
        """
        mean, std = self.transition(model_output, timestep, sample)
        if std == 0:
            raise ValueError(
                f"`timestep` is {float(timestep)}, whose step has no noise; takes one of a step with noise"
            )
        return gaussian_log_prob(prev_sample.detach(), mean, std, reduce=reduce)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchStochasticSchedulerOutput | tuple[torch.Tensor]:
        """Draws the next sample.

        Args:
            model_output: the velocity at `sample` and `timestep`.
            timestep: one of `timesteps`; only a run's first counts, where no begin index is set.
            sample: the network's input, (B, ...), of any floating dtype.
            generator: of the noise, one or one for each row; None is that of `recording`.
            return_dict: whether to give an output object; a tuple of the next sample otherwise.

        Returns:
            The next sample in the dtype of `model_output`, and its log-density as rounded to it.

        Raises:
            ValueError: no generator, or `timestep` as in the other schedulers.
        """
        generator = self._generator if generator is None else generator
        if self._step_index is None:
            self._init_step_index(timestep)
        mean, std = self._mean_and_std(self._step_index, model_output, sample)
        log_prob, following = None, mean
        if std > 0:
            if generator is None:
                raise ValueError("`generator` is None; takes a torch.Generator here or in recording()")
            generator = generator if isinstance(generator, torch.Generator) else list(generator)
            following = mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        following = following.to(model_output.dtype)
        if std > 0:
            log_prob = gaussian_log_prob(following.detach(), mean, std)
            if self._trajectory is not None:
                self._trajectory.append(
                    FlowTransition(
                        self.timesteps[self._step_index], sample.detach(), following.detach(), log_prob.detach()
                    )
                )
        self._step_index += 1
        return FlowMatchStochasticSchedulerOutput(following, log_prob, mean, std) if return_dict else (following,)

    def _mean_and_std(self, call: int, velocity: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, float]:
        precise = torch.promote_types(velocity.dtype, torch.float32)
        return flow_transition(
            velocity.to(precise),
            sample.to(precise),
            float(self._ends[call]),
            float(self._ends[call + 1]),
            noise_level=self.config.noise_level,
            kind=self.config.transition,
            first_sigma=float(self._ends[1]),
        )


def _check_noise(noise_level: Any, kind: str) -> None:
    if isinstance(noise_level, bool) or not isinstance(noise_level, (int, float)):
        raise TypeError(f"`noise_level` is a {type(noise_level).__name__}; takes a number")
    if kind not in KINDS:
        raise ValueError(f"`transition` is {kind!r}; takes 'sde' or 'ddim'")
    if not 0 <= noise_level < float("inf") or kind == "ddim" and noise_level > 1:
        raise ValueError(f"`noise_level` is {noise_level}; takes a number {'in [0, 1]' if kind == 'ddim' else '>= 0'}")
