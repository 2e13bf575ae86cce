"""Attacks with direct search on rounded features under a norm shell, against each of the two alone.

The claim: at 2000 evaluations the hybrid has at most half the error of attacks and a tenth of that of direct search,
and at 100 evaluations at most 1.5 times that of attacks.

    python -m trimtab.benchmarks.optim.directional [--seeds 10]

n = 32, phi(x) = W2 q(tanh(2 W1 x)) with W1 (64, 32) / sqrt(32), W2 (10, 64) / 8 and q rounding to 1/8 with a
straight-through gradient; f = -||phi - y*||^2; ||x|| within 1 of sqrt(32).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.search import DirectSearchResult, covering_direct_search, maximize_with_attacks

UNKNOWNS = 32


def shell(x: Tensor) -> Tensor:
    """The projection on sqrt(n) - 1 <= ||x|| <= sqrt(n) + 1."""
    root, length = math.sqrt(x.numel()), x.norm()
    return x * (length.clamp(root - 1, root + 1) / length)


def problem(seed: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """phi, f and the start of a seed."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(64, UNKNOWNS, generator=g) / math.sqrt(UNKNOWNS)
    second = torch.randn(10, 64, generator=g) / 8

    def phi(x: Tensor) -> Tensor:
        smooth = torch.tanh(2 * first @ x)
        return second @ (smooth + ((smooth * 8).round() / 8 - smooth).detach())

    target = phi(shell(torch.randn(UNKNOWNS, generator=g)))
    return phi, (lambda y: -(y - target).square().sum()), shell(torch.randn(UNKNOWNS, generator=g))


def at(found: DirectSearchResult, evaluations: int) -> float:
    """The error after so many evaluations."""
    return -max(value for count, value, _ in found.trace if count <= evaluations)


def measure(seeds: int) -> list[Row]:
    """Mean errors over seeds."""
    errors: dict[str, list[float]] = {"hybrid": [], "attacks": [], "direct": [], "hybrid 100": [], "attacks 100": []}
    for seed in range(seeds):
        phi, f, start = problem(seed)
        options = {"retract": shell, "max_evals": 2000}
        generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
        hybrid = maximize_with_attacks(phi, f, start, generator=generators[0], **options)
        attacks = maximize_with_attacks(phi, f, start, direct=False, generator=generators[1], **options)
        direct = covering_direct_search(lambda x, p=phi, f=f: f(p(x)), start, generator=generators[2], **options)
        for name, found in (("hybrid", hybrid), ("attacks", attacks), ("direct", direct)):
            errors[name].append(-found.value)
        errors["hybrid 100"].append(at(hybrid, 100))
        errors["attacks 100"].append(at(attacks, 100))
    mean = {name: sum(values) / seeds for name, values in errors.items()}
    hybrid = mean["hybrid"]
    at_100, attacks_100 = mean["hybrid 100"], mean["attacks 100"]
    return [
        Row("error at 2000 evaluations, hybrid against attacks", hybrid, mean["attacks"],
            "<= 1/2", 2 * hybrid <= mean["attacks"]),
        Row("error at 2000 evaluations, hybrid against direct search", hybrid, mean["direct"],
            "<= 1/10", 10 * hybrid <= mean["direct"]),
        Row("error at 100 evaluations, hybrid against attacks", at_100, attacks_100,
            "<= 1.5x", at_100 <= 1.5 * attacks_100),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    write_report("directional", measure(args.seeds), {"seeds": args.seeds})


if __name__ == "__main__":
    main()
