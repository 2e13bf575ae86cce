"""Mixtures of Gaussians as guides of an unknown with a standard normal prior, and their fit by a lower bound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, LowRankMultivariateNormal, Normal

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

from .estimator import estimate
from .objectives import elbo
from .program import sample

__all__ = ["MixtureFit", "MixtureGuide", "fit_mixture", "spread_starts"]

FLOOR = 1e-4
"""Of standard deviations: below it a density overflows."""


class MixtureGuide(nn.Module):
    """q(z) = sum_c w_c N(z; m_c, diag(s_c^2) + U_c U_c^T), float32 parameters, densities in float64.

    As a guide of `elbo` it draws c, then z, and gives the density of z alone, all components summed.

    Args:
        shape: of one z.
        num_components: C >= 1.
        family: "diagonal" leaves U out; "lowrank" has it.
        rank: columns of U, >= 1.
        means: (C, *shape), where the components begin; None is 0.
        scale: the standard deviation that they begin with.
        strategy: of the gradient of c: "enum" runs all C of them, "reinforce" draws one.

    Raises:
        ValueError, TypeError: an argument out of range, or means of another shape.

    Example:
        >>> guide = MixtureGuide((2,), 2, means=torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), scale=0.1)
        >>> guide.sample(4, torch.Generator().manual_seed(0)).sign()[:, 0].tolist()
        [-1.0, -1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_components: int = 4,
        *,
        family: Literal["diagonal", "lowrank"] = "diagonal",
        rank: int = 8,
        means: Tensor | None = None,
        scale: float = 1.0,
        strategy: Literal["enum", "reinforce"] = "enum",
    ) -> None:
        super().__init__()
        self.shape = tuple(checked_count("shape", size) for size in shape)
        self.family = checked_choice("family", family, ("diagonal", "lowrank"))
        self.strategy = checked_choice("strategy", strategy, ("enum", "reinforce"))
        count, size = checked_count("num_components", num_components), math.prod(self.shape)
        rank = checked_count("rank", rank) if family == "lowrank" else 0
        checked_number("scale", scale, above=FLOOR)
        if means is not None and tuple(means.shape) != (count, *self.shape):
            raise ValueError(f"`means` has shape {tuple(means.shape)}; takes {(count, *self.shape)}")
        start = torch.zeros(count, size) if means is None else means.detach().reshape(count, size).float()
        self.logits = nn.Parameter(start.new_zeros(count))
        self.mean = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(torch.full_like(start, math.log(scale - FLOOR)))
        self.factor = nn.Parameter(start.new_zeros(count, size, rank))

    @property
    def weights(self) -> Tensor:
        """(C,) of the components, without history."""
        return self.logits.detach().softmax(0)

    @property
    def scale(self) -> Tensor:
        """(C, n), the diagonal part's standard deviations."""
        return FLOOR + self.log_scale.exp()

    def simulate(self) -> tuple[dict[str, Tensor], Tensor]:
        """z (S, n) by the name "z", and log q(z) (S,), whose own parameters are constants; in a vectorized program.

        The score that this leaves out has expectation 0 ("sticking the landing", Roeder et al., arXiv 1703.09194),
        also under the enumerated choice: the gradient of sum_c w_c E_c[log q] reaches log q by w_c and z alone.
        """
        component = sample(Categorical(logits=self.logits), strategy=self.strategy, name="component")
        z = sample(self._component(component), strategy="reparam", name="z")
        return {"z": z}, self._log_density(z, detached=True)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-densities.

        Args:
            z: (N, *shape) floating.

        Returns:
            (N,) float64.

        Raises:
            ValueError: another shape.
        """
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"`z` has shape {tuple(z.shape)}; takes (N, {', '.join(map(str, self.shape))})")
        return self._log_density(z.flatten(1), detached=False)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws; the components have their shares as exactly as whole numbers allow.

        Systematic allocation: each draw alone is of q, and C equal components give C draws one each.

        Args:
            count: N >= 1.
            generator: None is seed 0.

        Returns:
            (N, *shape) float32.
        """
        checked_count("count", count)
        generator = checked_generator(generator)
        device, here = self.mean.device, generator.device
        places = (torch.arange(count, device=here) + torch.rand((), generator=generator, device=here)) / count
        bounds = self.weights.cumsum(0).to(here)
        c = torch.searchsorted(bounds, places).clamp_max(len(bounds) - 1).to(device)
        noise = torch.randn(count, self.mean.shape[1], generator=generator, device=here).to(device)
        z = self.mean[c] + self.scale[c] * noise
        if self.family == "lowrank":
            turn = torch.randn(count, self.factor.shape[2], generator=generator, device=here).to(device)
            z = z + (self.factor[c] @ turn[:, :, None])[:, :, 0]
        return z.reshape(count, *self.shape)

    def modes(self) -> Tensor:
        """(C, *shape), the components' means, those of the largest weight first."""
        return self.mean.detach()[self.weights.argsort(descending=True)].reshape(-1, *self.shape)

    def _component(self, c: Tensor) -> Distribution:
        if self.family == "diagonal":
            return Independent(Normal(self.mean[c], self.scale[c]), 1)
        return LowRankMultivariateNormal(self.mean[c], self.factor[c], self.scale[c].square())

    def _log_density(self, z: Tensor, *, detached: bool) -> Tensor:
        parts = self.logits, self.mean, self.scale, self.factor
        logits, mean, scale, factor = (p.detach().double() if detached else p.double() for p in parts)
        z = z.double()[:, None]
        if self.family == "diagonal":
            each = Independent(Normal(mean, scale), 1).log_prob(z)
        else:
            each = LowRankMultivariateNormal(mean, factor, scale.square()).log_prob(z)
        return torch.logsumexp(logits.log_softmax(0) + each, 1)


@dataclass(frozen=True)
class MixtureFit:
    """What a fit came to.

    Attributes:
        bound: of the log-evidence, the mean of the last tenth of the steps.
        history: (steps,) float64, each step's estimate of it.
        ess: effective sample size of the last step's evaluations as importance samples, from 1 to their number.
        num_evaluations: of the log-likelihood.
        stopped: why it ended early, or None.
    """

    bound: float
    history: Tensor
    ess: float
    num_evaluations: int
    stopped: str | None = None


def fit_mixture(
    log_likelihood: Callable[[Tensor], Tensor],
    guide: MixtureGuide,
    *,
    num_steps: int = 300,
    num_samples: int = 4,
    lr: float = 0.03,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], Any] | None = None,
) -> MixtureFit:
    """Fits a guide to the posterior p(z) proportional to N(z; 0, I) exp(log_likelihood(z)), in place.

    Adam climbs E_q[log p - log q] with a rate that falls linearly to 0: the objective is a program, in which the
    component is enumerated (or drawn) and z reparametrized (Becker et al., arXiv 2406.15742).

    Args:
        log_likelihood: z (S, n) to (S,), with a gradient.
        guide: that begins where it is.
        num_steps: >= 1.
        num_samples: S >= 1 of each component in a step; of all of them together under "reinforce".
        lr: > 0, of Adam.
        generator: of the draws; None is seed 0.
        callback: called as (step, bound) after each; True ends the fit there.

    Returns:
        A :class:`MixtureFit`. An interrupt from the keyboard, or a value that isn't finite after the first step, ends
        it with the guide of the step before.

    Raises:
        FloatingPointError: the first step's value isn't finite.
        ValueError, TypeError: an argument out of range.
    """
    checked_count("num_steps", num_steps)
    checked_count("num_samples", num_samples)
    optimizer = torch.optim.Adam(guide.parameters(), checked_number("lr", lr, above=0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    draws = _on(guide.mean.device, checked_generator(generator))
    weighed: list[Tensor] = []
    history: list[float] = []
    evaluations, stopped = 0, None

    def log_target(choices: Any) -> Tensor:
        z = choices["z"]
        prior = -0.5 * (z.double().square() + math.log(2 * math.pi)).sum(1)
        value = prior + log_likelihood(z).double()
        weighed.append((value.detach() - guide.log_prob(z.detach().reshape(-1, *guide.shape)).detach()).cpu())
        return value

    program = elbo(log_target, guide)
    for step in range(num_steps):
        weighed.clear()
        try:
            found = estimate(program, num_samples=num_samples, generator=draws, vectorized=True)
            gradients = torch.autograd.grad(-found.surrogate, list(guide.parameters()), allow_unused=True)
            if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
                raise RuntimeError("the gradient is not finite")
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            if not step:
                raise FloatingPointError(f"{error} at step 0: nothing to improve on") from error
            stopped = f"{error} at step {step}"
            warnings.warn(f"{stopped}; the result is the guide before that", RuntimeWarning, stacklevel=2)
            break
        except KeyboardInterrupt:
            if not step:
                raise
            stopped = f"interrupted at step {step}"
            break
        for parameter, gradient in zip(guide.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        evaluations += sum(map(len, weighed))
        history.append(float(found.value))
        ess = _effective(weighed, guide)
        if callback is not None and callback(step, history[-1]):
            stopped = f"the callback at step {step}"
            break
    optimizer.zero_grad()
    last = history[-max(1, len(history) // 10) :]
    return MixtureFit(sum(last) / len(last), torch.tensor(history, dtype=torch.float64), ess, evaluations, stopped)


def spread_starts(points: Tensor, values: Tensor, count: int, pool: int) -> list[int]:
    """Places of the best point, and then of the farthest from those taken, among the `pool` best.

    Components that begin together stay together: their mixture collapses to one.

    Args:
        points: (N, ...) floating, compared by Euclidean distance.
        values: (N,), higher is better; those that aren't finite are never taken.
        count: C, <= pool.
        pool: <= N.

    Returns:
        C places, the best first.

    Raises:
        ValueError: fewer points with finite values than `count`, or a count above the pool.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
        >>> spread_starts(points, torch.tensor([3.0, 2.0, 1.0, 0.0]), 2, 3)
        [0, 2]
    """
    checked_count("count", count)
    finite = torch.isfinite(values)
    if not count <= pool <= len(values) or int(finite.sum()) < count:
        raise ValueError(
            f"`count` is {count}, `pool` {pool}, of {int(finite.sum())} finite values; takes count <= pool <= values"
        )
    best = values.double().masked_fill(~finite, -torch.inf).argsort(descending=True)[:pool]
    best = best[finite[best]].to(points.device)
    x = points.flatten(1).double()[best]
    taken, distance = [0], torch.full((len(best),), torch.inf, dtype=torch.float64, device=x.device)
    while len(taken) < count:
        distance = torch.minimum(distance, (x - x[taken[-1]]).square().sum(1))
        distance[taken] = -1.0
        taken.append(int(distance.argmax()))
    return best[taken].tolist()


def _effective(weighed: list[Tensor], guide: MixtureGuide) -> float:
    """(sum w)^2 / sum w^2; under enumeration a component's samples have its share."""
    log_w = torch.cat(weighed)
    if guide.strategy == "enum":
        log_w = log_w + torch.cat([w.log().expand(len(part)) for w, part in zip(_order(guide), weighed, strict=True)])
    w = (log_w - log_w.max()).exp()
    return float(w.sum() ** 2 / w.square().sum())


def _order(guide: MixtureGuide) -> list[Tensor]:
    """Weights in the order in which `estimate` runs an enumerated site: the first, then the others from the last."""
    first, *others = guide.weights.double().cpu()
    return [first, *reversed(others)]


def _on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """Distributions draw on their parameters' device, so the generator is to be there."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)
