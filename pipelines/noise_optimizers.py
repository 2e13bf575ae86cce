"""How noise is proposed: the protocol between the loop and what searches, gradient ascent, and best of n."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import checked_count
from .noise_sphere import SphereMomentum

__all__ = [
    "NOISE_OPTIMIZERS",
    "BestOfN",
    "GradientAscent",
    "NoiseOptimizer",
    "NoiseProblem",
    "make_noise_optimizer",
    "norm_log_likelihood",
    "norm_log_likelihood_gradient",
]


@dataclass(frozen=True)
class NoiseProblem:
    """What a noise optimizer starts from.

    Attributes:
        latents: (B, *latent_shape) float32, the noise of each sample to begin with.
        num_steps: proposals that will be asked for.
        sample: draws fresh noise for all samples, (B, *latent_shape) float32, each from its own generator.
        generators: one for each sample or one for all, for whatever else is random.
    """

    latents: Tensor
    num_steps: int
    sample: Callable[[], Tensor]
    generators: torch.Generator | Sequence[torch.Generator] | None = None


class NoiseOptimizer(ABC):
    """Proposes noise for each sample of a batch and is told what became of it.

    The loop is

        for each step:
            proposals = optimizer.ask()                     # (B, K, *latent_shape): K candidates a sample
            rewards, gradients = ...                        # (B, K), and their gradients where needed
            optimizer.tell(rewards, gradients)              # not after the last step

    Samples are independent: no proposal for one may depend on what another was told. The loop itself keeps the best
    candidates. The first proposal should hold `problem.latents`, the pictures that improvements are measured
    against.

    Args:
        problem: what it starts from.

    Attributes:
        needs_gradient: whether `tell` needs gradients; the reward must then be differentiable and K is 1.
    """

    needs_gradient: bool = False

    def __init__(self, problem: NoiseProblem) -> None:
        self.problem = problem

    @abstractmethod
    def ask(self) -> Tensor:
        """The next candidates, (B, K, *latent_shape) float32. Never changed in place later."""

    @abstractmethod
    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """Takes what the last candidates are worth.

        Args:
            rewards: (B, K) floating on the CPU; minus infinity for a candidate whose reward isn't finite, and for
                samples that have ended, whose further proposals are not looked at. Under constraints an infeasible
                candidate's is lower than any feasible one's, and falls with its violation.
            gradients: (B, K, *latent_shape), of the rewards with respect to the candidates, where `needs_gradient`;
                0 for samples that have ended.
        """


class BestOfN(NoiseOptimizer):
    """Fresh noise at every step: the baseline that needs nothing but rewards."""

    def __init__(self, problem: NoiseProblem) -> None:
        super().__init__(problem)
        self._first = True

    def ask(self) -> Tensor:
        """The starting noise, then fresh noise: (B, 1, *latent_shape)."""
        latents = self.problem.latents.clone() if self._first else self.problem.sample()
        self._first = False
        return latents.unsqueeze(1)

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """Learns nothing."""


class GradientAscent(NoiseOptimizer):
    """Ascends reward(f(z)) + regularization_weight K(z), K the log-likelihood of the noise's norm.

    Each sample has an optimizer and a clip of its own, so a batch gives what its items give. The parameter stays
    float32. Where ReNO's code clips the whole batch and takes the norm in float16, this does neither.

    With `num_starts` above 1 the first proposals are fresh noise, without gradients, and the ascent sets out from the
    best of them: what is wrong as a whole, such as four owls in the place of three, a small step seldom mends.

    Args:
        problem: what it starts from.
        num_starts: noises to choose the start from, >= 1, the problem's own among them; at most a third of the
            proposals. ReNO has 1.
        optimizer: makes a `torch.optim.Optimizer` of a list of parameters, one sample's noise.
        regularization_weight: >= 0, of K.
        max_grad_norm: > 0, a sample's gradient is shortened to this length; None leaves it.

    Raises:
        ValueError: for a number out of range, or an optimizer whose step needs a closure.
        TypeError: if `optimizer` makes something else.
    """

    needs_gradient = True

    def __init__(
        self,
        problem: NoiseProblem,
        *,
        num_starts: int = 1,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = SphereMomentum,
        regularization_weight: float = 0.01,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.regularization_weight = _checked("regularization_weight", regularization_weight, least=0.0)
        if max_grad_norm is not None and _checked("max_grad_norm", max_grad_norm, least=0.0) == 0:
            raise ValueError("`max_grad_norm` is 0; takes None or a number > 0")
        self.max_grad_norm = max_grad_norm
        self._starts = min(checked_count("num_starts", num_starts), max(1, problem.num_steps // 3))
        self._told = 0
        self._start = problem.latents.detach().float().clone()
        self._start_rewards = torch.full((len(self._start),), float("-inf"), dtype=torch.float64)
        self.needs_gradient = self._starts == 1
        self.parameters = [nn.Parameter(row.detach().float().clone()) for row in problem.latents]
        self.optimizers = [optimizer([parameter]) for parameter in self.parameters]
        for made in self.optimizers[:1]:
            if not isinstance(made, torch.optim.Optimizer):
                raise TypeError(f"`optimizer` made a {type(made).__name__}; takes what makes a torch.optim.Optimizer")
            closure = inspect.signature(made.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(f"`optimizer` made a {type(made).__name__}, whose step needs a closure: takes others")

    def ask(self) -> Tensor:
        """The present noise, or fresh noise while the start is sought: (B, 1, *latent_shape)."""
        if not self.needs_gradient:
            self._asked = self.problem.latents.clone() if self._told == 0 else self.problem.sample()
            return self._asked.unsqueeze(1)
        return torch.stack([parameter.detach() for parameter in self.parameters]).unsqueeze(1)

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """One step of each sample's optimizer, or the best start so far; see `NoiseOptimizer.tell`."""
        if not self.needs_gradient:
            self._choose(rewards[:, 0].double().cpu())
            return
        noise = self.ask().squeeze(1)
        ascent = gradients.squeeze(1).float()
        if self.regularization_weight:
            ascent = ascent + self.regularization_weight * norm_log_likelihood_gradient(noise)
        if self.max_grad_norm is not None:
            norms = torch.linalg.vector_norm(ascent.flatten(1), dim=1)
            # The epsilon is that of torch.nn.utils.clip_grad_norm_, which the paper uses.
            factor = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            ascent = ascent * factor.view(-1, *[1] * (ascent.ndim - 1))
        for parameter, optimizer, row in zip(self.parameters, self.optimizers, ascent.unbind(), strict=True):
            parameter.grad = -row
            optimizer.step()

    @torch.no_grad()
    def _choose(self, rewards: Tensor) -> None:
        better = rewards > self._start_rewards
        rows = better.to(self._start.device).view(-1, *[1] * (self._start.ndim - 1))
        self._start = torch.where(rows, self._asked.float(), self._start)
        self._start_rewards = torch.where(better, rewards, self._start_rewards)
        self._told += 1
        if self._told == self._starts:
            for parameter, row in zip(self.parameters, self._start, strict=True):
                parameter.copy_(row)
            self.needs_gradient = True


def norm_log_likelihood(latents: Tensor) -> Tensor:
    """K(z) = (d - 1) log ||z|| - ||z||^2 / 2, the log-density of the norm of noise up to a constant.

    Args:
        latents: (B, ...), floating, no sample all zero; d is the number of a sample's elements.

    Returns:
        (B,) float32, largest where ||z|| = sqrt(d - 1). Differentiable.

    Raises:
        ValueError: if a sample is all zero.

    Source: Eyring et al., "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization"
    (arXiv 2406.04312), section 3; there the norm is taken in float16, here in float32.

    Example:
        >>> round(norm_log_likelihood(torch.ones(1, 4)).item(), 5)    # 3 log 2 - 2
        0.07944
    """
    norms = torch.linalg.vector_norm(latents.float().flatten(1), dim=1)
    if bool((norms == 0).any()):
        raise ValueError("`latents` has a sample that is all zero, whose norm has no log-likelihood")
    return (latents[0].numel() - 1) * norms.log() - 0.5 * norms.square()


def norm_log_likelihood_gradient(latents: Tensor) -> Tensor:
    """Its gradient z ((d - 1) / ||z||^2 - 1): (B, ...) float32.

    Example:
        >>> norm_log_likelihood_gradient(torch.ones(1, 4)).tolist()
        [[-0.25, -0.25, -0.25, -0.25]]
    """
    z = latents.float()
    squared = z.flatten(1).square().sum(1).view(-1, *[1] * (z.ndim - 1))
    return z * ((latents[0].numel() - 1) / squared - 1)


NOISE_OPTIMIZERS: dict[str, type[NoiseOptimizer]] = {"gradient": GradientAscent, "best-of-n": BestOfN}
"""What `optimizer=` takes by name, besides the searches of `noise_searches.SEARCHES`."""


def make_noise_optimizer(optimizer: Any, problem: NoiseProblem, options: dict[str, Any]) -> NoiseOptimizer:
    """A noise optimizer for a problem.

    Args:
        optimizer: a name in `NOISE_OPTIMIZERS` or `SEARCHES`, a subclass of `NoiseOptimizer`, or a factory of torch
            optimizers, which `GradientAscent` then uses.
        problem: what it starts from.
        options: keyword arguments of the class. For the paper's and the default ascent `lr`, `momentum` and
            `nesterov` among them are those of the torch optimizer.

    Raises:
        ValueError: for an unknown name or a value out of range.
        TypeError: for something else, or an option that the class doesn't have.
    """
    cls = noise_optimizer_class(optimizer)
    options = dict(options)
    if cls is GradientAscent:
        named = isinstance(optimizer, str) or optimizer is GradientAscent
        factory = options.pop("optimizer", SphereMomentum) if named else optimizer
        inner = {name: options.pop(name) for name in tuple(options) if name not in _ASCENT}
        options["optimizer"] = functools.partial(factory, **inner)
    return cls(problem, **options)


_ASCENT = ("num_starts", "regularization_weight", "max_grad_norm")


def noise_optimizer_class(optimizer: Any) -> type[NoiseOptimizer]:
    """The class behind what `optimizer=` takes; see `make_noise_optimizer`."""
    from .noise_searches import SEARCHES  # they are subclasses of what is defined here

    named = {**NOISE_OPTIMIZERS, **SEARCHES}
    if isinstance(optimizer, str):
        if optimizer not in named:
            takes = ", ".join(named)
            raise ValueError(f"`optimizer` is {optimizer!r}; takes {takes}, or a factory of torch optimizers")
        return named[optimizer]
    if isinstance(optimizer, type) and issubclass(optimizer, NoiseOptimizer):
        return optimizer
    if not callable(optimizer):
        takes = f"a name ({', '.join(named)}), a NoiseOptimizer class or a factory of torch optimizers"
        raise TypeError(f"`optimizer` is a {type(optimizer).__name__}; takes {takes}")
    return GradientAscent


def _checked(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` is a {type(value).__name__}; takes a number")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"`{name}` is {value}; takes a finite number >= {least:g}")
    return float(value)
