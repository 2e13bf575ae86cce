"""Variational objectives as short programs, and guides and models whose densities can only be estimated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from trimtab.optim.checks import checked_count

from .estimator import current_run
from .program import log_density, simulate

__all__ = ["Marginal", "Normalized", "elbo", "iwelbo", "p_wake", "q_wake"]

Choices = Mapping[str, Tensor]
LogTarget = Callable[[Choices], Tensor]


class Marginal:
    """The density of some of a program's choices, the others integrated out by importance sampling.

        simulate: (u_1, x) ~ q, u_2..N ~ r(. | x);    assess(x): u_1..N ~ r(. | x)
        w = 1/N sum_i q(u_i, x) / r(u_i | x)

    with E[w] = q(x) when assessed and E[1/w | x] = 1/q(x) when simulated, so that E[log p - log w] is a lower bound
    of log p's evidence on either side: hierarchical variational inference for N = 1.

    Source: Becker et al., arXiv 2406.15742, `marginal`.

    Args:
        joint: a program with named sites: x and u.
        keep: names of x.
        proposal: x's choices to a program that draws u, under the joint's names.
        num_particles: N >= 1.
    """

    def __init__(
        self,
        joint: Callable[[], Any],
        keep: tuple[str, ...],
        proposal: Callable[[Choices], Any],
        num_particles: int = 1,
    ) -> None:
        self.joint, self.keep, self.proposal = joint, tuple(keep), proposal
        self.num_particles = checked_count("num_particles", num_particles)

    def simulate(self) -> tuple[dict[str, Tensor], Tensor]:
        """x and log w; inside a program."""
        choices, log_q = simulate(self.joint)
        x = {name: choices[name] for name in self.keep}
        u = {name: value for name, value in choices.items() if name not in self.keep}
        first = log_q - log_density(lambda: self.proposal(x), u)
        return x, _log_mean_exp([first, *(self._particle(x) for _ in range(self.num_particles - 1))])

    def log_weight(self, x: Choices) -> Tensor:
        """log w at given x; inside a program."""
        return _log_mean_exp([self._particle(x) for _ in range(self.num_particles)])

    def _particle(self, x: Choices) -> Tensor:
        u, log_r = simulate(lambda: self.proposal(x))
        return log_density(self.joint, {**x, **u}) - log_r


class Normalized:
    """A distribution known up to its constant, by sampling-importance-resampling.

        simulate: z_i ~ q, w_i = p(z_i) / q(z_i), j drawn in proportion to w;   density p(z_j) / (1/N sum_i w_i)
        assess(x): the same with z_1 = x

    Source: Becker et al., arXiv 2406.15742, `normalize` (sir).

    Args:
        log_target: choices to log p, not normalized.
        proposal: a program with named sites.
        num_particles: N >= 1.
        strategy: of the choice of j: "reinforce", or "enum" for N runs.
    """

    def __init__(
        self, log_target: LogTarget, proposal: Callable[[], Any], num_particles: int = 16, strategy: str = "reinforce"
    ) -> None:
        self.log_target, self.proposal, self.strategy = log_target, proposal, strategy
        self.num_particles = checked_count("num_particles", num_particles)

    def particles(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Choices and log-weights (N, ...) from the proposal; inside a program."""
        drawn = [simulate(self.proposal) for _ in range(self.num_particles)]
        return [z for z, _ in drawn], torch.stack([self.log_target(z) - log_q for z, log_q in drawn])

    def simulate(self) -> tuple[dict[str, Tensor], Tensor]:
        """z_j and its estimated log-density; inside a program."""
        choices, log_w = self.particles()
        among = Categorical(logits=log_w.movedim(0, -1))
        place = current_run().choose(among, self.strategy, "resampling", None)  # a site, but not one of the density
        picked = {name: _pick(torch.stack([z[name] for z in choices]), place) for name in choices[0]}
        return picked, self.log_target(picked) - _log_mean_exp(list(log_w))

    def log_weight(self, x: Choices) -> Tensor:
        """The estimated log-density at x; inside a program."""
        rest = [simulate(self.proposal) for _ in range(self.num_particles - 1)]
        own = self.log_target(x) - log_density(self.proposal, x)
        return self.log_target(x) - _log_mean_exp([own, *(self.log_target(z) - log_q for z, log_q in rest)])


Guide = Callable[[], Any] | Marginal | Normalized
"""A program, or what has a `simulate` of its own."""


def elbo(log_target: LogTarget, guide: Guide, *, path_derivative: bool = False) -> Callable[[], Tensor]:
    """E_q[log p - log q]: a lower bound of the log-evidence.

    Args:
        log_target: choices to log p(choices, data); `log_density` of a model makes one.
        guide: a program with named sites, or a `Marginal` or `Normalized`, for hierarchical bounds.
        path_derivative: leaves out the score of log q at reparametrized sites: no variance at the exact posterior.

    Returns:
        A program for `estimate`.
    """
    return iwelbo(log_target, guide, num_particles=1, path_derivative=path_derivative)


def iwelbo(
    log_target: LogTarget, guide: Guide, *, num_particles: int = 5, path_derivative: bool = False
) -> Callable[[], Tensor]:
    """E[log 1/K sum_k p(z_k) / q(z_k)]: the importance-weighted bound, tighter with each particle.

    Args:
        log_target: as in `elbo`.
        guide: likewise.
        num_particles: K >= 1.
        path_derivative: for K = 1 alone: biased above.

    Returns:
        A program for `estimate`.

    Raises:
        ValueError: `path_derivative` with more than one particle, or with a guide that is no program.
    """
    checked_count("num_particles", num_particles)
    if path_derivative and (num_particles > 1 or hasattr(guide, "simulate")):
        raise ValueError("`path_derivative` is True; takes False with several particles or an estimated density")

    def program() -> Tensor:
        drawn = [_simulated(guide, path_derivative) for _ in range(num_particles)]
        return _log_mean_exp([log_target(z) - log_q for z, log_q in drawn])

    return program


def q_wake(log_target: LogTarget, guide: Callable[[], Any], *, num_particles: int = 16) -> Callable[[], Tensor]:
    """-E[log q(z)], z from the target by resampling from the guide: the wake step of the guide.

    The choice among the particles is summed out, and particles and weights are constants.

    Args:
        log_target: as in `elbo`.
        guide: a program with named sites.
        num_particles: N >= 1.

    Returns:
        A program for `estimate`.
    """
    return _wake(log_target, guide, num_particles, lambda z: log_density(guide, z))


def p_wake(log_target: LogTarget, guide: Callable[[], Any], *, num_particles: int = 16) -> Callable[[], Tensor]:
    """-E[log p(z, data)], z as in `q_wake`: the wake step of the model."""
    return _wake(log_target, guide, num_particles, log_target)


def _wake(
    log_target: LogTarget, guide: Callable[[], Any], num_particles: int, log_prob: LogTarget
) -> Callable[[], Tensor]:
    target = Normalized(log_target, guide, num_particles)

    def program() -> Tensor:
        with torch.no_grad():
            choices, log_w = target.particles()
            weights = log_w.softmax(0)
        return -sum(w * log_prob(z) for w, z in zip(weights, choices, strict=True))

    return program


def _simulated(guide: Guide, path_derivative: bool) -> tuple[Choices, Tensor]:
    if hasattr(guide, "simulate"):  # one with an estimated density, or with its own program
        return guide.simulate()
    return simulate(guide, path_derivative=path_derivative)


def _log_mean_exp(values: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(list(values)), 0) - math.log(len(values))


def _pick(values: Tensor, place: Tensor) -> Tensor:
    """values (N, ...)[place] or, for places (S,) of values (N, S, ...), each row's own."""
    return values[place] if place.ndim == 0 else values[place, torch.arange(len(place), device=place.device)]
