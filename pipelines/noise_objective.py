"""What noise is worth: the reward of its picture, and the gradient of that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from trimtab.rewards import RewardModel

from .noise_weights import worst_case_weights

__all__ = ["Evaluation", "NoiseObjective", "Sampler"]


Constraints = Callable[[Tensor, Tensor], Tensor]


class Sampler(Protocol):
    """A function of noise in two parts, as `GenerationMap` with output "latent" is one."""

    def __call__(self, latents: Tensor, *, prompt_index: Sequence[int] | None = None) -> Tensor:
        """Noise (R, ...) to clean latents of the same shape, row i under the prompt of its index."""

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents to pictures (R, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Evaluation:
    """What a batch of noise is worth.

    Attributes:
        rewards: (R,) float32 on the CPU, NaN where a picture or its reward isn't finite.
        terms: the reward's parts by name, each (R,) float32 on the CPU.
        monitor: (R,) float32 on the CPU, of the held-out reward, if there is one.
        images: (R, 3, H, W).
        gradients: of the rewards with respect to the noise, as it is shaped, if asked for.
        violations: (R,) float32 on the CPU, the sum of what constraints are above 0, or equality constraints above
            their tolerance, if there are any.
        residuals: (R, m), the equality constraints, with gradients.
        jacobians: (R, m, ...), their gradients with respect to the noise.
        kkt: (R,) float32 on the CPU, ||(gradient of the reward + G^T lambda, c)|| at the best lambda, with gradients.
    """

    rewards: Tensor
    terms: dict[str, Tensor]
    monitor: Tensor | None
    images: Tensor
    gradients: Tensor | None
    violations: Tensor | None = None
    residuals: Tensor | None = None
    jacobians: Tensor | None = None
    kkt: Tensor | None = None


class NoiseObjective:
    """reward(f(z), prompt), for rows of noise.

    Args:
        sampler: f.
        reward: of pictures; it may lie on another device than they.
        prompts: what the reward is told, one for each index.
        gradient: "full" goes through the sampler. "jacobian-free" takes the sampler's Jacobian for the identity, as
            FlowOpt does with its residual (arXiv 2510.22010): the reward's gradient at the clean latents is handed to
            the noise, and the sampler runs as in inference.
        batch_size: rows at once; None is all of them.
        monitor: a held-out reward.
        constraints: pictures and their noise to (R,) or (R, p), feasible where all are <= 0.
        equality_constraints: likewise with gradients, feasible where all are 0.
        equality_tolerance: what an equality constraint may be off.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: RewardModel,
        prompts: Sequence[str],
        *,
        gradient: Literal["full", "jacobian-free"] = "full",
        batch_size: int | None = None,
        monitor: RewardModel | None = None,
        constraints: Constraints | None = None,
        equality_constraints: Constraints | None = None,
        equality_tolerance: float = 1e-3,
    ) -> None:
        self.sampler = sampler
        self.reward = reward
        self.prompts = list(prompts)
        self.gradient = gradient
        self.batch_size = batch_size
        self.monitor = monitor
        self.constraints = constraints
        self.equality_constraints = equality_constraints
        self.equality_tolerance = equality_tolerance
        self.weights = worst_case_weights(reward, len(self.prompts))

    def __call__(self, latents: Tensor, index: Sequence[int], *, with_gradient: bool) -> Evaluation:
        """Evaluates noise.

        Args:
            latents: (R, *latent_shape) float32.
            index: each row's prompt; under worst-case weights each sample has one of its own.
            with_gradient: whether gradients are wanted.

        Raises:
            ValueError: for a reward that has no gradient although it is wanted, or returns another shape than (R,).
        """
        size = self.batch_size or len(latents)
        parts = [
            self._part(latents[start : start + size], list(index[start : start + size]), with_gradient)
            for start in range(0, len(latents), size)
        ]
        return Evaluation(
            terms={name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
            **{name: _joined([getattr(part, name) for part in parts]) for name in _ROWS},
        )

    def _part(self, latents: Tensor, index: list[int], with_gradient: bool) -> Evaluation:
        through_sampler = with_gradient and self.gradient == "full"
        with torch.set_grad_enabled(through_sampler):
            noise = latents.detach().requires_grad_(through_sampler)
            clean = self.sampler(noise, prompt_index=index)
        with torch.set_grad_enabled(with_gradient):
            if with_gradient and not through_sampler:
                noise = clean = clean.detach().requires_grad_()
            broken = ~torch.isfinite(clean.detach()).flatten(1).all(1)
            rows = broken.view(-1, *[1] * (clean.ndim - 1))
            images = self.sampler.decode(clean.masked_fill(rows, 0.0))
            texts = [self.prompts[i] for i in index]
            terms = self.reward.checked_terms(images.to(_device(self.reward, images)), texts)
            if self.weights is None:
                values = climbed = self.reward.combine(terms)
            else:
                climbed, values = self.weights(terms, index, with_gradient)
            off = self._equalities(images, noise)
            gradients = self._differentiated(climbed, noise, off is not None) if with_gradient else None
            jacobians = _jacobians(off, noise) if with_gradient and off is not None else None
        images = images.detach()
        violations = None if self.constraints is None else self._violations(images, latents.detach())
        if off is not None:
            excess = (off.detach().float().abs() - self.equality_tolerance).clamp_min(0).sum(1).cpu()
            violations = torch.where(torch.isfinite(excess), excess, torch.inf)
        monitor = None
        if self.monitor is not None:
            with torch.no_grad():
                monitor = self.monitor(images.to(_device(self.monitor, images)), texts).cpu()
        rewards = values.detach().cpu().masked_fill(broken.cpu(), float("nan"))
        return Evaluation(
            rewards=rewards.masked_fill(~torch.isfinite(rewards), float("nan")),
            terms={name: term.detach().cpu() for name, term in terms.items()},
            monitor=monitor,
            images=images,
            gradients=gradients,
            violations=violations,
            residuals=None if jacobians is None else off.detach(),
            jacobians=jacobians,
            kkt=None if jacobians is None else _kkt(gradients, off.detach(), jacobians),
        )

    @torch.no_grad()
    def _violations(self, images: Tensor, latents: Tensor) -> Tensor:
        values = self.constraints(images, latents)
        if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != len(images):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            takes = f"({len(images)},) or ({len(images)}, p)"
            raise ValueError(f"`constraints` gives {got}; takes one that gives {takes}, numbers for each picture")
        excess = values.float().reshape(len(images), -1).clamp_min(0).sum(1).cpu()
        return torch.where(torch.isfinite(excess), excess, torch.inf)

    def _equalities(self, images: Tensor, noise: Tensor) -> Tensor | None:
        if self.equality_constraints is None:
            return None
        values = self.equality_constraints(images, noise)
        if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != len(images):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            takes = f"({len(images)},) or ({len(images)}, m)"
            raise ValueError(f"`equality_constraints` gives {got}; takes one that gives {takes}")
        return values.reshape(len(images), -1)

    def _differentiated(self, values: Tensor, noise: Tensor, retain: bool = False) -> Tensor:
        gradient = None
        if values.requires_grad:
            # Rows don't mix, so the gradient of the sum is each one's own.
            (gradient,) = torch.autograd.grad(values.sum(), noise, allow_unused=True, retain_graph=retain)
        if gradient is None:
            raise ValueError(
                f"`reward` {self.reward.name!r} has no gradient with respect to the pictures; takes a reward that has "
                'one, or an optimizer that needs none, such as optimizer="best-of-n"'
            )
        return gradient.detach()


_ROWS = ("rewards", "monitor", "images", "gradients", "violations", "residuals", "jacobians", "kkt")


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


def _jacobians(off: Tensor, noise: Tensor) -> Tensor:
    """Each row's constraints' gradients, (R, m, ...)."""
    columns = []
    for column in off.unbind(1):
        gradient = None
        if column.requires_grad:
            (gradient,) = torch.autograd.grad(column.sum(), noise, allow_unused=True, retain_graph=True)
        if gradient is None:
            raise ValueError("`equality_constraints` has no gradient with respect to the noise; takes one that has")
        columns.append(gradient.detach())
    return torch.stack(columns, 1)


def _kkt(gradients: Tensor, off: Tensor, jacobians: Tensor) -> Tensor:
    found = []
    for g, c, J in zip(gradients, off, jacobians, strict=True):
        flat, rows = g.flatten().double(), J.flatten(1).double()
        lam = torch.linalg.lstsq((rows @ rows.T).cpu(), (rows @ flat).cpu()[:, None], driver="gelsd").solution[:, 0]
        left = torch.cat([flat.cpu() - rows.T.cpu() @ lam, c.double().cpu()])
        found.append(torch.linalg.vector_norm(left))
    return torch.stack(found).float()


def _device(reward: RewardModel, images: Tensor) -> torch.device:
    """Where a reward computes: with its weights, or with the pictures where it has none."""
    tensors = itertools.chain(reward.parameters(), reward.buffers())
    return next((tensor.device for tensor in tensors), images.device)
