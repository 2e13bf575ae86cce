"""Consensus-based optimization: a swarm that is pulled to its weighted mean and needs values only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number, checked_point

from .consensus_weights import alpha_for_ess, better, checked_alpha, consensus_point, finite_energies
from .sampling import SearchResult, evaluate, normal_like

__all__ = [
    "ConsensusBasedOptimization",
    "consensus_based_optimization",
    "contraction_factor",
]


def contraction_factor(dim: int, *, dt: float, lam: float, sigma: float, noise: str = "anisotropic") -> float:
    """E ||V_k - v||^2 / ||V_{k-1} - v||^2 about a consensus v that stands still.

    (1 - lam dt)^2 + sigma^2 dt for anisotropic noise; the second term times `dim` for isotropic. Below 1 the swarm
    contracts.

    Example:
        >>> round(contraction_factor(50, dt=0.1, lam=1.0, sigma=0.7, noise="isotropic"), 2)
        3.26
    """
    return (1 - lam * dt) ** 2 + (dim if noise == "isotropic" else 1) * sigma**2 * dt


class ConsensusBasedOptimization:
    """The swarm, asked for points and told their energies.

    With v the consensus of the points just evaluated, a step is

        V <- V - lam dt (V - v) + sigma sqrt(dt) D(V - v) xi,    xi ~ N(0, I)

    D(u) = diag(u) for anisotropic noise, ||u|| I for isotropic. With `particle_batch` a sweep goes through a random
    order of the particles in blocks, each with a consensus of its own. Where the consensus has moved less than
    `kick_tol` in all coordinates, every particle gets sigma sqrt(dt) xi. At the end of each epoch, if asked for,
    sigma is multiplied by log2(e + 1) / log2(e + 2) and alpha by 2 (`cooling`), and the swarm shrinks as its variance
    does (`reduction`).

    Source: Riedl et al., arXiv 2306.09778, equation 3; blocks, kick, cooling and reduction as in their experiments.

    Args:
        x0: (N, *shape), the particles at the start, N >= 2 and not all equal.
        dt: step > 0.
        lam: drift > 0, at most 1 / dt.
        sigma: noise >= 0. None is the square root of 0.7 of what still contracts.
        alpha: > 0, may be infinite, or "ess": `alpha_for_ess` at each step.
        eta: share of effective particles under "ess".
        noise: "anisotropic" or "isotropic".
        particle_batch: size of a block, dividing N; None is all.
        partial: a block's consensus moves that block alone; otherwise all particles.
        kick_tol: see above; None never kicks.
        epoch_length: tells in an epoch; needed for the next two.
        cooling: see above.
        reduction: speed in [0, 1) at which N follows the variance; 0.2 in the paper's experiments, 0 is off.
        generator: of the noise; None is seed 0.

    Attributes:
        particles: (N, *shape).
        consensus: the last consensus, or None.
        best: the best point evaluated and its energy.

    Raises:
        ValueError: a number out of range, N < 2, all particles equal.
        TypeError: something of another type.

    Warns:
        UserWarning: if the swarm would not contract; the paper has such a run too.

    Example:
        >>> search = ConsensusBasedOptimization(torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) + 2)
        >>> for _ in range(200):
        ...     points = search.ask()
        ...     search.tell(points.square().sum(1))
        >>> search.best[1] < 1e-2
        True
    """

    def __init__(
        self,
        x0: Tensor,
        *,
        dt: float = 0.1,
        lam: float = 1.0,
        sigma: float | None = None,
        alpha: float | Literal["ess"] = 100.0,
        eta: float = 0.2,
        noise: Literal["anisotropic", "isotropic"] = "anisotropic",
        particle_batch: int | None = None,
        partial: bool = True,
        kick_tol: float | None = 1e-5,
        epoch_length: int | None = None,
        cooling: bool = False,
        reduction: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.particles = checked_point("x0", x0).clone()
        count = len(self.particles) if self.particles.ndim else 0
        if count < 2 or not bool((self.particles != self.particles[:1]).any()):
            raise ValueError(f"`x0` has {count} particles; takes (N, ...) with N >= 2, not all equal")
        self.dt, self.lam = checked_number("dt", dt, above=0), checked_number("lam", lam, above=0)
        if lam * dt > 1:
            raise ValueError(f"`lam` dt is {lam * dt:g}; takes at most 1")
        self.noise = checked_choice("noise", noise, ("anisotropic", "isotropic"))
        dim = self.particles[0].numel()
        widest = math.sqrt((2 * lam - lam**2 * dt) / (dim if noise == "isotropic" else 1))
        self.sigma = math.sqrt(0.7) * widest if sigma is None else checked_number("sigma", sigma, least=0)
        factor = contraction_factor(dim, dt=dt, lam=lam, sigma=self.sigma, noise=noise)
        if factor >= 1:
            message = f"the swarm's spread grows by {factor:.3g} a step: it contracts for `sigma` below {widest:.3g}"
            warnings.warn(message, UserWarning, stacklevel=2)
        self.alpha, self.eta = checked_alpha(alpha), eta
        self.particle_batch = count if particle_batch is None else checked_count("particle_batch", particle_batch)
        if count % self.particle_batch:
            raise ValueError(f"`particle_batch` is {particle_batch}; takes a divisor of the {count} particles")
        self.partial, self.kick_tol = partial, kick_tol
        self.epoch_length = None if epoch_length is None else checked_count("epoch_length", epoch_length)
        self.cooling, self.reduction = cooling, checked_number("reduction", reduction, least=0)
        if (cooling or reduction) and epoch_length is None:
            raise ValueError("`epoch_length` is None; takes the steps after which `cooling` or `reduction` act")
        self.generator = checked_generator(generator)
        self.consensus: Tensor | None = None
        self.best: tuple[Tensor, float] | None = None
        self.step = 0
        self.epoch = 1
        self.record: dict[str, Any] = {}
        self._queue: list[Tensor] = []
        self._variance = self._spread()

    def ask(self) -> Tensor:
        """The particles whose energies are wanted next, (n, *shape); the same until `tell`."""
        if not self._queue:
            count = len(self.particles)
            order = torch.arange(count)
            if self.particle_batch < count:
                order = torch.randperm(count, generator=self.generator, device=self.generator.device).cpu()
            self._queue = list(order.split(self.particle_batch))
        return self.particles[self._queue[0]].clone()

    def tell(self, energies: Tensor) -> None:
        """Takes the energies (n,) of the particles last asked for, and moves the swarm.

        Raises:
            ValueError: for another shape, or none that is finite.
            RuntimeError: without a preceding `ask`.
        """
        if not self._queue:
            raise RuntimeError("`tell` takes energies of what `ask` gave; call `ask` first")
        block = self._queue[0]
        asked = self.particles[block]
        known = finite_energies(energies, len(asked))
        alpha = alpha_for_ess(known, self.eta) if self.alpha == "ess" else float(self.alpha)
        consensus, weights = consensus_point(asked, known, alpha)
        self._queue.pop(0)
        self.best = better(self.best, asked, known)
        before, self.consensus = self.consensus, consensus
        moved = block if self.partial else torch.arange(len(self.particles))
        self.particles[moved] = self._moved(self.particles[moved], consensus)
        kicked = before is not None and self.kick_tol is not None
        if kicked := kicked and float((consensus - before).abs().max()) < self.kick_tol:
            self.particles += self.sigma * math.sqrt(self.dt) * normal_like(self.particles, self.generator)
        self.step += 1
        self.record = {
            "step": self.step,
            "best": self.best[1],
            "alpha": alpha,
            "sigma": self.sigma,
            "ess": float(1 / weights.square().sum()),
            "not_finite": int((~torch.isfinite(known)).sum()),
            "particles": len(self.particles),
            "kicked": bool(kicked),
        }
        if self.epoch_length and self.step % self.epoch_length == 0:
            self._end_epoch()

    def _moved(self, particles: Tensor, consensus: Tensor) -> Tensor:
        away = particles - consensus
        scale = away
        if self.noise == "isotropic":
            scale = torch.linalg.vector_norm(away.flatten(1), dim=1).view(-1, *[1] * (away.ndim - 1))
        noise = self.sigma * math.sqrt(self.dt) * scale * normal_like(particles, self.generator)
        return particles - self.lam * self.dt * away + noise

    def _end_epoch(self) -> None:
        if self.cooling:
            self.sigma *= math.log2(self.epoch + 1) / math.log2(self.epoch + 2)
            self.alpha = self.alpha if self.alpha == "ess" else 2 * self.alpha
        if self.reduction and not self._queue:
            now = self._spread()
            keep = 1 + self.reduction * (now / self._variance - 1) if self._variance > 0 else 1.0
            blocks = math.ceil(len(self.particles) * min(max(keep, 0.8), 1.0) / self.particle_batch)
            if self.particle_batch < len(self.particles):
                self.particles = self.particles[: max(blocks * self.particle_batch, 2)].clone()
            else:
                count = math.ceil(len(self.particles) * min(max(keep, 0.8), 1.0))
                self.particles = self.particles[: max(count, 2)].clone()
                self.particle_batch = len(self.particles)
            self._variance = self._spread()
        self.epoch += 1

    def _spread(self) -> float:
        """The norm of the coordinates' variances."""
        return float(torch.linalg.vector_norm(self.particles.flatten(1).float().var(0, correction=0)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run goes on from, generator included: tensors, numbers, lists."""
        state = {name: getattr(self, name) for name in _STATE}
        state["particles"] = self.particles.clone()
        state["queue"] = [block.clone() for block in self._queue]
        state["variance"] = self._variance
        state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: for particles of another shape.
        """
        if state["particles"].shape[1:] != self.particles.shape[1:]:
            got, takes = tuple(state["particles"].shape[1:]), tuple(self.particles.shape[1:])
            raise ValueError(f"`state` has points of shape {got}; takes {takes}")
        for name in _STATE:
            setattr(self, name, state[name])
        self.particles = state["particles"].to(self.particles.device, copy=True)
        self._queue = [block.clone() for block in state["queue"]]
        self._variance = state["variance"]
        self.generator.set_state(state["generator"])


_STATE = ("alpha", "sigma", "particle_batch", "consensus", "best", "step", "epoch", "record")


def consensus_based_optimization(
    fn: Callable[..., Tensor],
    x0: Tensor,
    *,
    steps: int = 250,
    batches: Iterator[Any] | None = None,
    chunk: int | None = None,
    callback: Callable[[int, dict[str, Any]], bool | None] | None = None,
    **options: Any,
) -> SearchResult:
    """Minimizes a function by its values with a swarm; see `ConsensusBasedOptimization`.

    Args:
        fn: (n, *shape) to energies (n,), lower is better. Called without gradients.
        x0: (N, *shape), the particles at the start.
        steps: consensus points formed.
        batches: mini-batches of the objective, one drawn a step; `fn` then takes (points, batch).
        chunk: points that `fn` gets at once; None is all.
        callback: called with the step and its record; a true value ends the run.
        options: of `ConsensusBasedOptimization`.

    Returns:
        The best point evaluated, or with `batches` the last consensus and its energy on the last batch.

    Raises:
        ValueError: a number out of range, energies of another shape or none that is finite.

    Example:
        >>> start = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + 3
        >>> result = consensus_based_optimization(lambda x: (x - 1).square().sum(1), start, steps=100)
        >>> result.value < 1e-2, result.num_evaluations
        (True, 4000)
    """
    checked_count("steps", steps)
    search = ConsensusBasedOptimization(x0, **options)
    history, evaluations, reason = [], 0, "steps"
    batch: tuple[Any, ...] = ()
    for step in range(steps):
        points = search.ask()
        batch = () if batches is None else (next(batches),)
        search.tell(evaluate(fn, points, chunk, *batch))
        evaluations += len(points)
        history.append(search.record)
        if callback is not None and callback(step, search.record):
            reason = "callback"
            break
    if batches is None:
        x, value = search.best
    else:
        x = search.consensus
        value, evaluations = float(evaluate(fn, x.unsqueeze(0), chunk, *batch)), evaluations + 1
    return SearchResult(x, value, search.consensus, tuple(history), evaluations, reason)
