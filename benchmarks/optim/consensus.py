"""Consensus hopping on a piecewise constant reward of noise, against as many random noises and diagonal CMA-ES.

The claim: without any gradient it ends at an error at least five times smaller than best of n, on the noise's sphere.

    python -m trimtab.benchmarks.optim.consensus [--seeds 10]

d = 256, W (128, 256) with entries N(0, 1/256), target tanh(1.5 W z0), energy the mean square of
round(8 tanh(W z)) / 8 - target. 32 samples a step, 60 steps, width 0.5 to 0.05: 1920 evaluations each. The canyon is
the paper's figure: 200 particles, 250 steps, from (8, 8).
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.search import consensus_based_optimization, consensus_hopping

DIM, STEPS, PARTICLES = 256, 60, 32


def problem(seed: int) -> tuple[Callable[[Tensor], Tensor], torch.Generator]:
    """The energy (n, 256) -> (n,) of a seed, and its generator."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(128, DIM, generator=generator) / math.sqrt(DIM)
    target = torch.tanh(1.5 * weights @ torch.randn(DIM, generator=generator))

    def energy(z: Tensor) -> Tensor:
        return ((8 * torch.tanh(z @ weights.T)).round() / 8 - target).square().mean(1)

    return energy, generator


def diagonal_cma(energy: Callable[[Tensor], Tensor], x0: Tensor, seed: int) -> float:
    """The best that separable CMA-ES finds, with the same population and evaluations."""
    import cma

    options = {"popsize": PARTICLES, "maxiter": STEPS, "CMA_diagonal": True, "seed": seed + 1, "verbose": -9}
    search = cma.CMAEvolutionStrategy(x0.double().numpy(), 0.5, options)
    for _ in range(STEPS):
        points = search.ask()
        search.tell(points, energy(torch.from_numpy(np.stack(points)).float()).tolist())
    return float(search.result.fbest)


def canyon(v: Tensor) -> Tensor:
    """The paper's two-dimensional objective: minimum 0 at the origin."""
    x, y = v[..., 0], v[..., 1]
    c, b = y - ((x - 1) * (x - 4) ** 2 / 8 + 2), -x - 1.6 * y
    wall = 25 * (1 - torch.exp(-1.4 * c**2 * torch.exp(-0.002 * x**4))) + 0.4 * x**2 + 0.2 * y**2
    ripples = 1.1625 * ((1 - torch.cos(0.75 * math.pi * x)) + (1 - torch.cos(0.75 * math.pi * y)))
    return wall + ripples + 4 * torch.exp(1 - 2 * c**4) * ((1 - torch.exp(-9 * b**2)) * b.sign()).clamp_min(0)


def canyon_rows(runs: int) -> list[Row]:
    """Runs that end within 0.25 of the minimum: the swarm, hopping, and gradient descent."""
    swarm = hops = 0
    settings = {"dt": 0.01, "lam": 1.0, "sigma": 1.6, "alpha": 100.0, "noise": "isotropic", "kick_tol": None}
    hopping = {"num_particles": 200, "width": 0.7, "width_end": 0.7, "alpha": 100.0, "geometry": "euclidean"}
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        start = 8 + 0.5 * torch.randn(200, 2, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the paper's sigma is outside the contracting range
            found = consensus_based_optimization(canyon, start, steps=250, generator=generator, **settings)
        swarm += bool(found.consensus.norm() < 0.25)
        x0 = torch.full((2,), 8.0)
        found = consensus_hopping(canyon, x0, steps=250, chunk=None, elite=False, generator=generator, **hopping)
        hops += bool(found.consensus.norm() < 0.25)
    return [
        Row(f"canyon: runs of {runs} at the minimum, swarm against gradient descent",
            swarm, 0, ">= 90 %", swarm >= 0.9 * runs),
        Row(f"canyon: runs of {runs} at the minimum, hopping at a fixed width", hops, 0, "> 0", hops > 0),
    ]  # fmt: skip


def measure(seeds: int) -> list[Row]:
    """Mean errors over seeds."""
    hopping, random, cma_es, off = [], [], [], []
    for seed in range(seeds):
        energy, generator = problem(seed)
        x0 = torch.randn(DIM, generator=generator)
        options = {"steps": STEPS, "num_particles": PARTICLES, "chunk": None}
        found = consensus_hopping(energy, x0, generator=generator, **options)
        hopping.append(found.value)
        off.append(abs(float(found.x.norm()) / math.sqrt(DIM) - 1))
        random.append(float(energy(torch.randn(STEPS * PARTICLES, DIM, generator=generator)).min()))
        cma_es.append(diagonal_cma(energy, x0, seed))
    ours, best_of_n, cma_mean = (sum(values) / seeds for values in (hopping, random, cma_es))
    return [
        Row("piecewise constant reward: error, hopping against best of 1920", ours, best_of_n,
            "5x smaller", 5 * ours <= best_of_n),
        Row("the same against diagonal CMA-ES (which leaves the sphere)", ours, cma_mean, "reported", True),
        Row("norm of the noise over sqrt(d), largest deviation from 1", max(off), 1e-4, "<= 1e-4", max(off) <= 1e-4),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    write_report("consensus", measure(args.seeds) + canyon_rows(2 * args.seeds), {"seeds": args.seeds})


if __name__ == "__main__":
    main()
