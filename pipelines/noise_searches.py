"""Searches over noise that need rewards only: consensus hopping, directional search, and CMA-ES."""

from __future__ import annotations

import functools
import math
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
        region: share of the noise's height and width, in (0, 1], that a particle changes: a window at a random place.
            Below 1 what is right elsewhere in the picture mostly stays.
        options: of `ConsensusHopping`: `width`, `width_end`, `alpha`, `eta`, `elite`, `num_starts`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self, problem: NoiseProblem, *, num_particles: int = 8, width: float = 0.7, region: float = 1.0, **options: Any
    ) -> None:
        super().__init__(problem)
        checked_count("num_particles", num_particles, 2)
        if _checked_region(region) < 1:
            options["mask"] = functools.partial(_window, tuple(problem.latents.shape[1:]), region)
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

    The noise of a code a is (z + sum_j a_j v_j) / sqrt(1 + sum_j a_j^2) at each element, put back at the norm of z; the
    v_j are noise themselves, so what is searched stays typical, and a_j = 1 replaces half of z's variance. A success
    becomes the next z, with directions drawn anew. One picture of each sample a step. See
    `trimtab.optim.search.DirectSearch`.

    Args:
        problem: what it starts from.
        num_directions: n, 1 to 200.
        num_starts: noises to choose z from, >= 1, the problem's own among them; at most half of the pictures.
        region: share of the noise's height and width, in (0, 1], that a direction lies in: a window at a random place.
        options: of `DirectSearch`: `r0`, `r_dsm`, `poll`, `covering`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        problem: NoiseProblem,
        *,
        num_directions: int = 32,
        num_starts: int = 1,
        region: float = 1.0,
        r0: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(problem)
        if checked_count("num_directions", num_directions) > 200:
            raise ValueError(f"`num_directions` is {num_directions}; direct search takes at most 200 here")
        _checked_region(region)
        self.starts_left = min(checked_count("num_starts", num_starts), max(1, problem.num_steps // 2))
        self.starts = problem.latents.float()
        self.start_rewards = torch.full((len(self.starts),), float("-inf"), dtype=torch.float64)
        generators = _generators(problem)
        shape = tuple(problem.latents.shape[1:])
        self._drawn = functools.partial(_directions, (num_directions, *shape), region)
        self.directions = [self._drawn(generator) for generator in generators]
        zero = torch.zeros(num_directions)
        self.searches = [DirectSearch(zero, r0=r0, generator=generator, **options) for generator in generators]
        self._first = True

    def ask(self) -> Tensor:
        """One trial of each sample: (B, 1, *latent_shape)."""
        if self.starts_left:
            self._asked = self.problem.latents.float() if self._first else self.problem.sample().float()
            self._first = False
            return self._asked.unsqueeze(1)
        rows = []
        for start, search, (directions, windows) in zip(self.starts, self.searches, self.directions, strict=True):
            code = search.ask()
            moved = start + torch.tensordot(code, directions, dims=1).to(start.device)
            moved = moved / (1 + torch.tensordot(code.square(), windows, dims=1)).sqrt().to(start.device)
            rows.append(moved * (start.norm() / moved.norm()))
        self._asked = torch.stack(rows)
        return self._asked.unsqueeze(1)

    def tell(self, rewards: Tensor, gradients: Tensor | None = None) -> None:
        """Moves each incumbent that the trial beats."""
        if self.starts_left:
            values = rewards[:, 0].double().cpu()
            better = values > self.start_rewards
            rows = better.to(self.starts.device).view(-1, *[1] * (self.starts.ndim - 1))
            self.starts = torch.where(rows, self._asked, self.starts)
            self.start_rewards = torch.where(better, values, self.start_rewards)
            self.starts_left -= 1
            if not self.starts_left:
                for search, value in zip(self.searches, self.start_rewards.tolist(), strict=True):
                    if math.isfinite(value):
                        search.ask()
                        search.tell(value)
            return
        for row, search in enumerate(self.searches):
            if search.phase == "start":
                continue
            search.tell(float(rewards[row, 0]))
            if bool((search.x != 0).any()):  # the code is one of steps from the incumbent
                self.starts = self.starts.clone()
                self.starts[row] = self._asked[row]
                search.x = torch.zeros_like(search.x)
                self.directions[row] = self._drawn(search.generator)


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


def _checked_region(region: float) -> float:
    if checked_number("region", region, above=0) > 1:
        raise ValueError(f"`region` is {region}; takes a share of at most 1")
    return region


def _directions(shape: tuple[int, ...], region: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise within windows, and the windows, both (n, *latent_shape) on the CPU."""
    noise = torch.randn(shape, generator=generator, device=generator.device).cpu()
    windows = torch.stack([_window(shape[1:], region, generator) for _ in noise])
    return noise * windows, windows


def _window(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """1 in a window at a random place, 0 elsewhere, on the CPU.

    Args:
        shape: of one sample's noise, height and width last; packed noise (tokens, channels) loses rows of tokens.
        share: of the height and of the width, in (0, 1].
        generator: of its place.
    """
    mask = torch.zeros(shape)
    if len(shape) < 3:
        size = max(1, round(share**2 * shape[0]))
        place = int(torch.randint(shape[0] - size + 1, (), generator=generator, device=generator.device))
        mask[place : place + size] = 1.0
        return mask
    sizes = [max(1, round(share * length)) for length in shape[-2:]]
    tops = [
        int(torch.randint(length - size + 1, (), generator=generator, device=generator.device))
        for length, size in zip(shape[-2:], sizes, strict=True)
    ]
    mask[..., tops[0] : tops[0] + sizes[0], tops[1] : tops[1] + sizes[1]] = 1.0
    return mask


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
