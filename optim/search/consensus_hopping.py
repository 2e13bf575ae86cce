"""Consensus hopping: sample around the last consensus, take the weighted mean, repeat."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number, checked_point

from .consensus_weights import alpha_for_ess, better, checked_alpha, consensus_point
from .sampling import SearchResult, evaluate, normal_like

__all__ = ["ConsensusHopping", "consensus_hopping"]


class ConsensusHopping:
    """A point that hops to the consensus of samples around it, asked for samples and told their energies.

        V_i = x_{k-1} + s xi_i,    x_k = sum_i V_i exp(-alpha E(V_i)) / sum_j exp(-alpha E(V_j))

    With many samples x_k - x_{k-1} = s^2 grad log E[exp(-alpha E(x + s xi))]: an implicit gradient step of length
    alpha s^2, without a gradient. On "sphere", for the noise of a generator, samples are V_i = sqrt(1 - s^2) x + s xi_i
    and they and the consensus are put at the norm `radius`, since a mean of noise is shorter than noise.

    Source: Riedl, Klock, Geldhauser, Fornasier, "Gradient is All You Need?" (arXiv 2306.09778), equation 6. The
    sphere, the elite and the choice of alpha by effective sample size are ours.

    Args:
        x0: (*shape), where to start.
        steps: over which the width falls; asking for more keeps the last width.
        num_particles: samples a step, >= 2. The first of them all is `x0` itself if `elite`.
        width: s at the first step, > 0; on the sphere at most 1.
        width_end: s at the last one.
        alpha: > 0, may be infinite, or "ess".
        eta: share of effective samples under "ess".
        geometry: "sphere" or "euclidean".
        radius: on the sphere; None is the square root of the number of elements.
        elite: the best point so far takes part in each mean, with its energy as it was measured.
        num_starts: hops before the width counts, on the sphere: their samples are fresh noise, and the consensus is
            the best of all, since a mean of unrelated points is near none of them.
        mask: draws, from the generator, which elements a sample changes, a tensor of 0 and 1 that broadcasts with
            (*shape); None changes all. A step in a random subspace leaves the rest of a point as it is.
        generator: of the samples; None is seed 0.

    Attributes:
        consensus: (*shape).
        best: the best point evaluated and its energy, or None before the first `tell`.

    Raises:
        ValueError: a number out of range, or `x0` is 0 on the sphere.
        TypeError: something of another type.

    Example:
        >>> search = ConsensusHopping(torch.ones(8), steps=40, geometry="euclidean")
        >>> for _ in range(40):
        ...     search.tell(search.ask().square().sum(1))
        >>> search.best[1] < 0.1
        True
    """

    def __init__(
        self,
        x0: Tensor,
        *,
        steps: int = 60,
        num_particles: int = 32,
        width: float = 0.5,
        width_end: float = 0.05,
        alpha: float | Literal["ess"] = "ess",
        eta: float = 0.2,
        geometry: Literal["sphere", "euclidean"] = "sphere",
        radius: float | None = None,
        elite: bool = True,
        num_starts: int = 0,
        mask: Callable[[torch.Generator], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.steps = checked_count("steps", steps)
        self.num_particles = checked_count("num_particles", num_particles, 2)
        self.width = checked_number("width", width, above=0)
        self.width_end = checked_number("width_end", width_end, above=0)
        self.geometry = checked_choice("geometry", geometry, ("sphere", "euclidean"))
        if geometry == "sphere" and max(width, width_end) > 1:
            raise ValueError(f"`width` is {max(width, width_end)}; takes at most 1 on the sphere")
        self.num_starts, self.mask = checked_count("num_starts", num_starts, 0), mask
        if num_starts and geometry == "euclidean":
            raise ValueError(f"`num_starts` is {num_starts}; takes 0 but on the sphere, which alone has fresh points")
        self.alpha, self.eta, self.elite = checked_alpha(alpha), eta, elite
        self.start = checked_point("x0", x0).clone()
        self.radius = math.sqrt(x0.numel()) if radius is None else checked_number("radius", radius, above=0)
        if geometry == "sphere" and not bool((self.start != 0).any()):
            raise ValueError("`x0` is 0; takes a point with a direction on the sphere")
        self.consensus = self._placed(self.start.unsqueeze(0))[0]
        self.generator = checked_generator(generator)
        self.best: tuple[Tensor, float] | None = None
        self.step = 0
        self.record: dict[str, Any] = {}
        self._asked: Tensor | None = None

    def ask(self) -> Tensor:
        """Samples whose energies are wanted next, (num_particles, *shape); the same until `tell`."""
        if self._asked is None:
            width = self._width()
            keep = math.sqrt(1 - width**2) if self.geometry == "sphere" else 1.0
            noise = normal_like(self.consensus, self.generator, (self.num_particles, *self.consensus.shape))
            samples = keep * self.consensus + width * noise
            if self.mask is not None and self.step >= self.num_starts:
                chosen = torch.stack([self.mask(self.generator) for _ in samples]).to(samples.device, torch.bool)
                samples = torch.where(chosen, samples, self.consensus)
            samples = self._placed(samples)
            if self.step == 0 and self.elite:
                samples[0] = self.start
            self._asked = samples
        return self._asked.clone()

    def tell(self, energies: Tensor) -> None:
        """Takes the energies (num_particles,) of the samples last asked for, and hops.

        Raises:
            ValueError: for another shape, or none that is finite.
            RuntimeError: without a preceding `ask`.
        """
        if self._asked is None:
            raise RuntimeError("`tell` takes energies of what `ask` gave; call `ask` first")
        samples, known = self._asked, energies
        if tuple(getattr(energies, "shape", ())) == (len(samples),):
            known = energies.detach().double().cpu()
            known = torch.where(torch.isfinite(known), known, torch.inf)
            if self.elite and self.best is not None:
                samples = torch.cat([samples, self.best[0].unsqueeze(0)])
                known = torch.cat([known, torch.tensor([self.best[1]], dtype=torch.float64)])
        alpha = alpha_for_ess(known, self.eta) if self.alpha == "ess" else float(self.alpha)
        alpha = math.inf if self.step < self.num_starts else alpha
        consensus, weights = consensus_point(samples, known, alpha)
        self.best = better(self.best, samples, known)
        self.consensus = self._placed(consensus.unsqueeze(0))[0]
        self._asked = None
        self.record = {
            "step": self.step + 1,
            "best": self.best[1],
            "alpha": alpha,
            "width": self._width(),
            "ess": float(1 / weights.square().sum()),
            "not_finite": int((~torch.isfinite(known)).sum()),
        }
        self.step += 1

    def _width(self) -> float:
        if self.step < self.num_starts:
            return 1.0
        step, last = self.step - self.num_starts, max(self.steps - self.num_starts - 1, 1)
        share = min(step, last) / last
        return self.width + share * (self.width_end - self.width)

    def _placed(self, x: Tensor) -> Tensor:
        if self.geometry == "euclidean":
            return x
        norms = torch.linalg.vector_norm(x.flatten(1).float(), dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return x * (self.radius / norms).to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run goes on from, generator included: tensors and numbers."""
        asked = None if self._asked is None else self._asked.clone()
        state = {"consensus": self.consensus.clone(), "best": self.best, "step": self.step, "record": self.record}
        return {**state, "asked": asked, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: for a point of another shape.
        """
        if state["consensus"].shape != self.start.shape:
            got, takes = tuple(state["consensus"].shape), tuple(self.start.shape)
            raise ValueError(f"`state` has points of shape {got}; takes {takes}")
        self.consensus = state["consensus"].to(self.start.device, copy=True)
        self.best, self.step, self.record, self._asked = state["best"], state["step"], state["record"], state["asked"]
        self.generator.set_state(state["generator"])


def consensus_hopping(
    fn: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    steps: int = 60,
    chunk: int | None = 8,
    callback: Callable[[int, dict[str, Any]], bool | None] | None = None,
    **options: Any,
) -> SearchResult:
    """Minimizes a function of one point by its values; see `ConsensusHopping`.

    Args:
        fn: (n, *shape) to energies (n,), lower is better. Called without gradients. Its values must not change from
            call to call: fix the seeds of what is random in it.
        x0: (*shape), such as a latent (4, 64, 64).
        steps: hops.
        chunk: samples that `fn` gets at once; None is all.
        callback: called with the step and its record; a true value ends the run.
        options: of `ConsensusHopping`.

    Returns:
        The best sample evaluated.

    Raises:
        ValueError: a number out of range, energies of another shape or none that is finite.

    Example:
        >>> target = torch.tensor([1.0, -1.0, 1.0, 1.0])
        >>> result = consensus_hopping(lambda z: (z - target).square().sum(1), torch.ones(4), steps=30)
        >>> result.value < 0.1, round(result.x.norm().item(), 4)
        (True, 2.0)
    """
    search = ConsensusHopping(x0, steps=steps, **options)
    history, reason = [], "steps"
    for step in range(steps):
        search.tell(evaluate(fn, search.ask(), chunk))
        history.append(search.record)
        if callback is not None and callback(step, search.record):
            reason = "callback"
            break
    evaluations = len(history) * search.num_particles
    return SearchResult(*search.best, search.consensus, tuple(history), evaluations, reason)
