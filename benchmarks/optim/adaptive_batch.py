"""AdAdaGrad-Norm against fixed batches at equal samples, each with its own best rate, and its rate of convergence.

The claim: with the rate tuned for each (and eta, among 0.5, 0.7 and 1, where there is one), the growing batch ends
within 1.1 times the loss of batches of 8 in a fiftieth of their steps; and where batches are as large as the exact norm
test asks, min_k ||grad F(x_k)||^2 falls at least as 1 / K.

    python -m trimtab.benchmarks.optim.adaptive_batch [--seeds 10]

The problem: f = sum_j lambda_j x_j^2 / 2 in 20 dimensions, lambda from 0.1 to 1, unit noise on every coordinate of a
sample's gradient, 20,000 samples, start (1, ..., 1). The rate: F = sum_j x_j^2 / (1 + x_j^2), which is not convex, with
the same noise, 2,000 steps from (2, ..., 2), slopes of log-log lines from step 20 on, averaged over the seeds.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import nn

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim import AdaGradNorm, AdaptiveBatchSize

LAMBDAS = torch.linspace(0.1, 1.0, 20)
SAMPLES, LARGEST = 20_000, 2000
RATES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
ADAGRAD_RATES = (0.1, 0.2, 0.5, 1.0, 2.0)
ETAS = (0.5, 0.7, 1.0)


def descend(seed: int, rate: float, size: int, **controller: object) -> tuple[float, int]:
    """Final loss and steps; a controller's arguments let the batch grow from ``size``."""
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.ones(20))
    coordinates = controller.get("test") == "coordinate"
    kind = torch.optim.Adagrad if coordinates else AdaGradNorm
    optimizer = kind([x], lr=rate)
    batch = AdaptiveBatchSize(size, max_size=LARGEST, **controller) if controller else None
    seen = steps = 0
    while seen < SAMPLES:
        b = min(batch.size if batch else size, SAMPLES - seen)
        grads = LAMBDAS * x.detach() + torch.randn(b, 20, generator=generator)
        x.grad = grads.mean(0)
        optimizer.step()
        if batch and b > 1:
            batch.update(grads)
        seen, steps = seen + b, steps + 1
    return float(0.5 * (LAMBDAS * x.detach().square()).sum()), steps


def tuned(seeds: int, size: int, rates: tuple[float, ...], **controller: object) -> tuple[float, float, float]:
    """Best mean loss over the rates, its mean number of steps and its rate."""
    results = []
    for rate in rates:
        runs = [descend(seed, rate, size, **controller) for seed in range(seeds)]
        loss, steps = (float(np.mean(column)) for column in zip(*runs, strict=True))
        results.append((loss, steps, rate))
    return min(results)


def slope(seeds: int, size: int | None, eta: float = 0.5) -> float:
    """Of log min_k ||grad F||^2 against log k; ``size`` None takes the exact test's batch at every step."""
    slopes = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = nn.Parameter(torch.full((20,), 2.0, dtype=torch.float64))
        optimizer = AdaGradNorm([x], lr=3.0)
        squares = []
        for _ in range(2000):
            gradient = 2 * x.detach() / (1 + x.detach().square()).square()
            squares.append(max(float(gradient.square().sum()), 1e-30))
            b = size or math.ceil(20 / (eta**2 * squares[-1]))
            x.grad = gradient + torch.randn(20, generator=generator, dtype=torch.float64) / math.sqrt(b)
            optimizer.step()
        best = np.minimum.accumulate(squares)[19:]
        slopes.append(np.polyfit(np.log(np.arange(20, 2001)), np.log(best), 1)[0])
    return float(np.mean(slopes))


def measure(seeds: int) -> tuple[list[Row], dict]:
    """All rows, and every method's best loss, steps and rate."""
    runs = {f"batch {size}": tuned(seeds, size, RATES) for size in (8, 64, 500, 2000)}
    paper = {"max_growth": math.inf, "debias": False}
    for eta in ETAS:
        runs[f"norm test, eta {eta:g}"] = tuned(seeds, 8, RATES, eta=eta, **paper)
        runs[f"norm test, eta {eta:g}, debiased, doubling"] = tuned(seeds, 8, RATES, eta=eta)
    runs["inner product"] = tuned(seeds, 8, RATES, test="inner_product", **paper)
    runs["augmented"] = tuned(seeds, 8, RATES, test="augmented", **paper)
    runs["coordinates, AdaGrad"] = tuned(seeds, 8, ADAGRAD_RATES, test="coordinate", **paper)
    small, small_steps, _ = runs["batch 8"]
    (loss, steps, _), name = min(
        (run, name) for name, run in runs.items() if "norm" in name and run[1] * 50 <= small_steps
    )
    large, large_steps, _ = runs["batch 2000"]
    exact, fixed = slope(seeds, None), slope(seeds, 8)
    rows = [
        Row(f"{name}: loss against batch 8's", loss, small, "<= 1.1x", loss <= 1.1 * small),
        Row("  steps for that", steps, small_steps, "<= 1/50", steps <= small_steps / 50),
        Row("a fixed batch of 2000 likewise: loss", large, small, "no bar", True),
        Row("  steps for that", large_steps, small_steps, "no bar", True),
        Row("slope of min ||grad||^2, exact test against batch 8", exact, fixed, "<= -1", exact <= -1),
    ]  # fmt: skip
    table = {name: dict(zip(("loss", "steps", "rate"), run, strict=True)) for name, run in runs.items()}
    return rows, table


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    rows, table = measure(args.seeds)
    for name, run in table.items():
        print(f"{name:44} loss {run['loss']:.4f} in {run['steps']:.0f} steps at rate {run['rate']:g}")
    write_report("adaptive_batch", rows, {"seeds": args.seeds, "rates": RATES, "runs": table})


if __name__ == "__main__":
    main()
