"""Searches over noise that need rewards only: consensus hopping, directional search, and CMA-ES."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_count, checked_number
from trimtab.optim.search import ConsensusHopping, DirectSearch

from .noise_optimizers import NoiseOptimizer, NoiseProblem

__all__ = ["SEARCHES", "ConsensusNoise", "DiagonalCMA", "DirectionalNoise"]


class ConsensusNoise(NoiseOptimizer):
    """Consensus hopping on the sphere of each sample's starting noise; see `trimtab.optim.search.ConsensusHopping`.

    Args:
        problem: what it starts from.
        num_particles: pictures of each sample a step, >= 2; the start is the first of them all.
        options: of `ConsensusHopping`: `width`, `width_end`, `alpha`, `eta`, `elite`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, problem: NoiseProblem, *, num_particles: int = 8, width: float = 0.7, **options: Any) -> None:
        super().__init__(problem)
        checked_count("num_particles", num_particles, 2)
        self.searches = [
            ConsensusHopping(
                row.float(),
                steps=problem.num_steps,
                num_particles=num_particles,
                width=width,
                radius=float(row.float().norm()),
                generator=generator,
                **options,
            )
            for row, generator in zip(problem.latents, _generators(problem), strict=True)
        ]

    def ask(self) -> Tensor:
        """Samples about each consensus: (B, num_particles, *latent_shape)."""
        return torch.stack([search.ask() for search in self.searches])

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """Hops, but for samples that have ended."""
        for search, values in zip(self.searches, rewards, strict=True):
            if bool(torch.isfinite(values).any()):
                search.tell(-values)


class DirectionalNoise(NoiseOptimizer):
    """Covering direct search over a code of each sample's noise, which stays on its sphere.

    The noise of a code a is the starting noise plus sum_j a_j v_j / sqrt(n), put back at its norm; the v_j are noise
    themselves, so what is searched stays typical. One picture of each sample a step. See
    `trimtab.optim.search.DirectSearch`.

    Args:
        problem: what it starts from.
        num_directions: n, 1 to 200.
        options: of `DirectSearch`: `r0`, `r_dsm`, `poll`, `covering`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, problem: NoiseProblem, *, num_directions: int = 32, r0: float = 1.0, **options: Any) -> None:
        super().__init__(problem)
        if checked_count("num_directions", num_directions) > 200:
            raise ValueError(f"`num_directions` is {num_directions}; direct search takes at most 200 here")
        self.starts = problem.latents.float()
        generators = _generators(problem)
        shape = (num_directions, *problem.latents.shape[1:])
        self.directions = [
            torch.randn(shape, generator=generator, device=generator.device).to(self.starts.device)
            for generator in generators
        ]
        zero = torch.zeros(num_directions)
        self.searches = [DirectSearch(zero, r0=r0, generator=generator, **options) for generator in generators]

    def ask(self) -> Tensor:
        """One trial of each sample: (B, 1, *latent_shape)."""
        rows = []
        for search, start, directions in zip(self.searches, self.starts, self.directions, strict=True):
            code = search.ask().to(start.device)
            if not bool((code != 0).any()):
                rows.append(start)
                continue
            moved = start + torch.tensordot(code, directions, dims=1) / len(directions) ** 0.5
            rows.append(moved * (start.norm() / moved.norm()))
        return torch.stack(rows).unsqueeze(1)

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """Moves each incumbent that the trial beats."""
        for search, values in zip(self.searches, rewards, strict=True):
            if bool(torch.isfinite(values).any()) or search.phase != "start":
                search.tell(float(values[0]))


class DiagonalCMA(NoiseOptimizer):
    """CMA-ES with a diagonal covariance (N. Hansen's `cma`), the baseline; candidates are put on the noise's sphere.

    Args:
        problem: what it starts from.
        num_particles: pictures of each sample a step, >= 2; the start is the first of them all.
        sigma: > 0, the deviation to begin with.

    Raises:
        ValueError: for a number out of range.
        ImportError: without the package `cma`.
    """

    def __init__(self, problem: NoiseProblem, *, num_particles: int = 8, sigma: float = 0.5) -> None:
        super().__init__(problem)
        try:
            import cma
        except ImportError as error:
            raise ImportError('`optimizer="cma"` takes the package cma: pip install "trimtab[search]"') from error
        import numpy as np

        checked_count("num_particles", num_particles, 2)
        checked_number("sigma", sigma, above=0)
        self.searches = []
        for row, generator in zip(problem.latents, _generators(problem), strict=True):
            random = np.random.default_rng(_seed(generator))
            options = {
                "popsize": num_particles,
                "CMA_diagonal": True,
                "verbose": -9,
                "seed": np.nan,  # leaves NumPy's global generator alone
                "randn": lambda *shape, random=random: random.standard_normal(shape),
            }
            search = cma.CMAEvolutionStrategy(row.double().flatten().cpu().numpy(), sigma, options)
            search.inject([row.double().flatten().cpu().numpy()], force=True)
            self.searches.append(search)
        self._asked: list[Any] = []

    def ask(self) -> Tensor:
        """A population of each sample: (B, num_particles, *latent_shape)."""
        import numpy as np

        self._asked = [search.ask() for search in self.searches]
        populations = []
        for start, points in zip(self.problem.latents.float(), self._asked, strict=True):
            population = torch.from_numpy(np.stack(points)).to(start.device, torch.float32)
            population = population * (start.norm() / population.norm(dim=1, keepdim=True))
            populations.append(population.view(-1, *start.shape))
        return torch.stack(populations)

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """One generation, but for samples that have ended."""
        for search, points, values in zip(self.searches, self._asked, rewards, strict=True):
            if bool(torch.isfinite(values).any()):
                worst = values[torch.isfinite(values)].min()
                search.tell(points, (-torch.where(torch.isfinite(values), values, worst)).double().tolist())


SEARCHES: dict[str, type[NoiseOptimizer]] = {
    "consensus": ConsensusNoise,
    "directional": DirectionalNoise,
    "cma": DiagonalCMA,
}
"""What `optimizer=` takes by name, besides gradient ascent and best of n."""


def _generators(problem: NoiseProblem) -> list[torch.Generator]:
    """One for each sample: seeded from the sample's own or, where all share one, drawn from it in turn."""
    given = problem.generators
    if given is None:
        given = torch.Generator()
        given.seed()
    shared = [given] * len(problem.latents) if isinstance(given, torch.Generator) else list(given)
    shared = shared * len(problem.latents) if len(shared) == 1 else shared
    return [torch.Generator().manual_seed(_seed(generator)) for generator in shared]


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
