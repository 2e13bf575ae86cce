"""Convex two-layer ReLU training against what it is compared with: ``python -m trimtab.benchmarks.optim.convex_relu``.

The claims: the programs' optima are an interior-point method's to 1e-4 and the recovered networks'; with all patterns
no network is better; ADMM converges linearly and the time of an iteration grows at most as the square of the width;
with few of many patterns AdamW is better, and `polish` over its own patterns is never worse. Then a probe of labels
that no linear function gives, and a robust head at the worst points of boxes.

    python -m trimtab.benchmarks.optim.convex_relu [--seeds 4]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.solvers import (
    convex_relu,
    enumerate_patterns,
    fit_linear_head,
    improvement_bound,
    polish,
    relu_objective,
    sample_patterns,
    sampled_convex_relu,
)
from trimtab.optim.solvers.activation_patterns import ActivationPatterns, with_ones

WIDTHS = (32, 64, 128, 256)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def interior_point(X: Tensor, y: Tensor, patterns: ActivationPatterns, beta: float, loss: str, epsilon: float) -> float:
    """The optimum of the program by Clarabel."""
    import cvxpy as cp

    A, D, columns = with_ones(X, True).numpy(), patterns.active.double().numpy(), X.shape[1]
    v, w = cp.Variable((len(D), A.shape[1])), cp.Variable((len(D), A.shape[1]))
    f = sum(cp.multiply(D[i], A @ (v[i] - w[i])) for i in range(len(D)))
    cones = [
        cp.multiply(2 * D[i] - 1, A @ block[i]) >= epsilon * cp.norm1(block[i, :columns])
        for i in range(len(D))
        for block in (v, w)
    ]
    spread = epsilon * cp.sum(cp.abs(D.T @ (v - w)[:, :columns]), axis=1)
    margin = cp.multiply(y.numpy(), f) - spread
    value = {
        "squared": lambda: cp.sum_squares(cp.abs(f - y.numpy()) + spread) / 2,
        "hinge": lambda: cp.sum(cp.pos(1 - margin)),
        "logistic": lambda: cp.sum(cp.logistic(-margin)),
    }[loss]()
    decay = beta * (cp.sum(cp.norm(v, axis=1)) + cp.sum(cp.norm(w, axis=1)))
    return float(cp.Problem(cp.Minimize(value + decay), cones).solve(solver="CLARABEL"))


def optima() -> list[Row]:
    """Objectives of small programs against the interior-point method's, and of the recovered networks."""
    X = torch.randn(10, 2, generator=generator(0), dtype=torch.float64)
    y, patterns, rows, networks = (X[:, 0] * X[:, 1]).sign(), sample_patterns(X, 6), [], []
    for loss, epsilon in [(loss, epsilon) for loss in ("squared", "hinge", "logistic") for epsilon in (0.0, 0.02)]:
        known = interior_point(X, y, patterns, 0.1, loss, epsilon)
        options: dict[str, Any] = {"rho": 0.01 if loss == "hinge" else 0.1, "max_iterations": 1500, "tolerance": 1e-7}
        result = convex_relu(X, y, patterns, beta=0.1, loss=loss, epsilon=epsilon, **options)
        what = f"objective, {loss} loss{', robust' if epsilon else ''}: ADMM, interior point"
        rows.append(Row(what, result.objective, known, "within 1e-4", abs(result.objective - known) < 1e-4))
        if not epsilon:
            networks.append(relu_objective(result.to_module(), X, y, beta=0.1, loss=loss) - result.objective)
    largest = max(map(abs, networks))
    rows.append(
        Row("objective of recovered networks less the program's, largest", largest, 0.0, "1e-9", largest < 1e-9)
    )
    result = convex_relu(X, y, patterns, beta=0.1, rho=0.3, tolerance=1e-10, max_iterations=6000)
    tail = np.log10(result.residuals[len(result.residuals) // 4 :])
    steps = np.arange(len(tail))
    slope, level = np.polyfit(steps, tail, 1)
    kept = float(1 - np.var(tail - level - slope * steps) / np.var(tail))
    what = "ADMM's residuals: share of the log's variance that a line explains, factor an iteration"
    rows.append(Row(what, kept, float(10**slope), "above 0.9, below 1", kept > 0.9 and slope < 0))
    return rows


def trained(
    X: Tensor, y: Tensor, width: int, beta: float, steps: int, seed: int, loss: str = "squared"
) -> nn.Sequential:
    """A network by full-batch AdamW on the same objective."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(X.shape[1], width), nn.ReLU(), nn.Linear(width, 1, bias=False)).double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        f = module(X)[:, 0]
        value = (f - y).square().sum() / 2 if loss == "squared" else softplus(-y * f).sum()
        (value + beta / 2 * sum(p.square().sum() for p in module.parameters())).backward()
        optimizer.step()
    return module


def whole_and_sampled() -> list[Row]:
    """All patterns of twelve points on a line; some of more than ten thousand of forty points in four dimensions."""
    X = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    y = torch.sin(3 * X[:, 0])
    result = convex_relu(X, y, enumerate_patterns(X), beta=0.01, tolerance=1e-8)
    wide = [relu_objective(trained(X, y, 50, 0.01, 2000, s), X, y, beta=0.01) for s in range(4)]
    narrow = [relu_objective(trained(X, y, 4, 0.01, 2000, s), X, y, beta=0.01) for s in range(8)]
    best = min(wide)
    rows = [
        Row("all 23 patterns: duality gap", result.duality_gap, 0.0, "below 1e-4", result.duality_gap < 1e-4),
        Row(
            "all patterns: objective, the best of four AdamW networks of width 50",
            result.objective,
            best,
            "within 1e-3, not above",
            -1e-3 < result.objective - best < 1e-5,
        ),
        Row(
            "all patterns: objective, the best of eight of width 4",
            result.objective,
            min(narrow),
            "not above",
            result.objective < min(narrow) + 1e-5,
        ),
    ]
    X = torch.randn(40, 4, generator=generator(0), dtype=torch.float64)
    y = torch.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2]
    module = trained(X, y, 50, 0.1, 3000, 0)
    descent = relu_objective(module, X, y, beta=0.1)
    for num in (10, 30, 100):
        patterns = sample_patterns(X, num)
        value = convex_relu(X, y, patterns, beta=0.1, max_iterations=1500).objective
        rows.append(Row(f"{num} sampled patterns: objective, AdamW of width 50", value, descent, "beside it", True))
    bound = improvement_bound(patterns, len(X))
    rows.append(Row("100 patterns: how probably one more helps, at most (95%)", bound, 1.0, "in [0, 1]", bound <= 1))
    for num in (100, 1000):
        value = sampled_convex_relu(X, y, num, beta=0.1).objective
        rows.append(Row(f"{num} random features: objective, AdamW of width 50", value, descent, "beside it", True))
    after = polish(module, X, y, beta=0.1, max_iterations=1500).after
    rows.append(Row("AdamW of width 50 polished: objective, before", after, descent, "not above", after <= descent))
    return rows


def slopes(rounds: int = 3) -> list[Row]:
    """How the time of an iteration grows with the width: the slope of a line through logarithms."""
    X = torch.randn(100, 8, generator=generator(0), dtype=torch.float64)
    y, rows = (X[:, 0] * X[:, 1]).sign(), []
    for inner in ("cholesky", "cg", "rbcd"):
        seconds = []
        for width in WIDTHS:
            patterns = sample_patterns(X, width)

            def once(count: int, patterns: ActivationPatterns = patterns, inner: str = inner) -> float:
                start = time.thread_time()
                convex_relu(X, y, patterns, beta=0.1, rho=1.0, inner=inner, max_iterations=count, tolerance=1e-12)
                return time.thread_time() - start

            # the difference leaves out the factorization and the dual bound, which are computed once
            seconds.append(min(once(12) for _ in range(rounds)) - min(once(2) for _ in range(rounds)))
        slope = float(np.polyfit(np.log(WIDTHS), np.log(np.maximum(seconds, 1e-6)), 1)[0])
        what = f"time of an iteration, {inner}: slope in the width from {WIDTHS[0]} to {WIDTHS[-1]}"
        rows.append(Row(what, slope, 2.0, "at most 2", slope <= 2))
    return rows


def crooked(seed: int, count: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that no linear function gives, y = sign(z0 z1 + |z2|/2 - 0.3 z3 - 0.25), and z turned and scaled."""
    z = torch.randn(count, 16, generator=generator(seed), dtype=torch.float64)
    y = torch.where(z[:, 0] * z[:, 1] + z[:, 2].abs() / 2 - 0.3 * z[:, 3] - 0.25 > 0, 1.0, -1.0).double()
    return z @ seen, y


def accuracy(module: nn.Module, X: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((module(X)[:, 0] * y > 0).double().mean())


def attacked(module: nn.Module, X: Tensor, y: Tensor, epsilon: float, steps: int = 20) -> float:
    """Accuracy at points of the boxes that projected gradient descent finds."""
    moved = X.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad((module(moved)[:, 0] * y).sum(), moved)
        moved = (moved.detach() - epsilon / 4 * gradient.sign()).clamp(X - epsilon, X + epsilon)
    return accuracy(module, moved, y)


def probes(seeds: int) -> list[Row]:
    """The probe of the crooked labels: 400 examples, 4000 others."""
    found: dict[str, list[float]] = {"linear": [], "convex": [], "AdamW": [], "again": []}
    for seed in range(seeds):
        turn = torch.randn(16, 16, generator=generator(100 + seed), dtype=torch.float64) / 4
        X, y = crooked(seed, 400, turn)
        X_new, y_new = crooked(1000 + seed, 4000, turn)
        scale = X.std(0)
        X, X_new = X / scale, X_new / scale
        found["linear"].append(accuracy(fit_linear_head(X, y > 0, l2=1 / 400), X_new, y_new))
        patterns = sample_patterns(X, 100, generator=generator(seed))
        options: dict[str, Any] = {"beta": 1.0, "loss": "logistic", "rho": 1.0, "max_iterations": 300}
        heads = [convex_relu(X, y, patterns, **options).to_module() for _ in range(2)]
        found["convex"].append(accuracy(heads[0], X_new, y_new))
        found["again"].append(float((heads[0](X_new) - heads[1](X_new)).abs().max()))
        found["AdamW"].append(accuracy(trained(X, y, 100, 1.0, 1000, seed, "logistic"), X_new, y_new))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    worst = min(a - b for a, b in zip(found["convex"], found["linear"], strict=True))
    return [
        Row("probe: accuracy with 100 sampled patterns, linear", mean["convex"], mean["linear"], "beside it", True),
        Row("probe: gain over linear, the worst of the seeds", worst, 0.08, "at least 0.08", worst >= 0.08),
        Row(
            "probe: accuracy with 100 sampled patterns, AdamW of width 100",
            mean["convex"],
            mean["AdamW"],
            "beside",
            True,
        ),
        Row("probe: largest difference of a second fit", max(found["again"]), 0.0, "none", max(found["again"]) == 0),
    ]


def robust(epsilon: float = 0.1) -> list[Row]:
    """Worst-case accuracy of the robust and the plain hinge form on two-dimensional crooked labels."""
    gains = []
    for seed in range(4):
        X = torch.randn(30, 2, generator=generator(seed), dtype=torch.float64)
        X_new = torch.randn(2000, 2, generator=generator(50 + seed), dtype=torch.float64)
        y, y_new = (torch.where(x[:, 0].abs() > 0.7, 1.0, -1.0).double() for x in (X, X_new))
        patterns = sample_patterns(X, 30, epsilon=epsilon, generator=generator(seed))
        options: dict[str, Any] = {"beta": 0.01, "loss": "hinge", "max_iterations": 600}
        heads = [convex_relu(X, y, patterns, epsilon=radius, **options).to_module() for radius in (epsilon, 0.0)]
        gains.append([attacked(head, X_new, y_new, epsilon) for head in heads])
    mine, plain = (float(value) for value in np.mean(gains, 0))
    what = f"accuracy at the worst points of boxes of {epsilon:g}: robust hinge, plain"
    return [Row(what, mine, plain, "at least 0.05 above", mine >= plain + 0.05)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="of the probe")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    rows = []
    for part in (optima, whole_and_sampled, slopes, lambda: probes(seeds), robust):
        rows += part()
        print(rows[-1].what, rows[-1].ours, rows[-1].baseline, flush=True)
    write_report("convex_relu", rows, {"seeds": seeds, "widths": WIDTHS})


if __name__ == "__main__":
    main()
