"""Gradient-normalized Newton beside L-BFGS and cubic Newton on logistic regression: iterations to a gradient of 1e-8.

The claim: with exact Hessians it needs few iterations whatever the conditioning, without any constant being set.

    python -m trimtab.benchmarks.optim.newton

300 rows, 20 columns whose scales spread so that the Gram matrix has condition number 1, 1e4 and 1e8 (before rotation),
labels drawn from a logistic model, l2 = 1e-6, from 0 and from a far start. L-BFGS is scipy's with its defaults but for
the tolerance. Cubic Newton is Nesterov and Polyak's with a doubling and halving search for its constant; Fisher's and
Gauss-Newton's matrices stand in for the Hessian in the last columns.

And log-sum-exp, mu log sum exp((<a_i, x> - b_i) / mu) of 500 rows, 50 columns and mu = 0.05 with its minimum at 0, from
1 to a gap of 1e-6: with the exact Hessian, with A^T Diag(pi) A / mu in its place, with none, and by L-BFGS.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.solvers import fisher_hessian, gradient_normalized_newton, logsumexp_hessian

ROWS, COLUMNS, L2, GOAL = 300, 20, 1e-6, 1e-8


def problem(condition: float, seed: int = 0) -> Tensor:
    """Rows (300, 20) times their labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -math.log10(condition) / 2, COLUMNS, dtype=torch.float64)
    truth = torch.randn(COLUMNS, generator=generator, dtype=torch.float64) / scales / 4
    x = x * scales
    won = torch.rand(ROWS, generator=generator, dtype=torch.float64) < torch.sigmoid(x @ truth)
    return torch.where(won[:, None], x, -x) @ rotation


def cubic_newton(x: Tensor, start: Tensor, limit: int = 500) -> tuple[int, int]:
    """Iterations and solves of the cubic regularized method: minimizes the model with M |d|^3 / 6."""
    w, M, solves = start.clone(), 1.0, 0
    eye = torch.eye(len(w), dtype=w.dtype)

    def value(z: Tensor) -> Tensor:
        return softplus(-(x @ z)).mean() + L2 / 2 * z.square().sum()

    for iteration in range(limit):
        p = torch.sigmoid(-(x @ w))
        g = -(x.T @ p) / ROWS + L2 * w
        if float(g.norm()) <= GOAL:
            return iteration, solves
        H = (x.T * (p * (1 - p))) @ x / ROWS + L2 * eye
        for _ in range(60):
            low, high = 0.0, 1e6
            for _ in range(60):  # |d(r)| = r with (H + M r / 2) d = -g
                r = (low + high) / 2
                d = -torch.linalg.solve(H + M * r / 2 * eye, g)
                low, high = (r, high) if float(d.norm()) > r else (low, r)
            solves += 1
            model = g @ d + d @ H @ d / 2 + M / 6 * d.norm() ** 3
            if float(value(w + d)) <= float(value(w) + model) + 1e-15:
                break
            M *= 2
        w, M = w + d, max(M / 2, 1e-8)
    return limit, solves


def runs(x: Tensor, start: Tensor) -> dict[str, float]:
    """Iterations of each method; infinity where it did not get there."""

    def f(w: Tensor) -> Tensor:
        return softplus(-(x @ w)).mean() + L2 / 2 * w.square().sum()

    def exact(w: Tensor) -> Tensor:
        p = torch.sigmoid(x @ w)
        return (x.T * (p * (1 - p))) @ x / ROWS + L2 * torch.eye(COLUMNS, dtype=w.dtype)

    outer = fisher_hessian(lambda w: softplus(-(x @ w)))
    counts: dict[str, float] = {}
    for name, hessian in {
        "exact": exact,
        "Fisher": lambda w: outer(w) / ROWS,
        "diagonal": lambda w: exact(w).diagonal(),
    }.items():
        found = gradient_normalized_newton(f, start, hessian=hessian, max_iterations=500, grad_tolerance=GOAL)
        counts[name] = found.num_iterations if found.status == "converged" else math.inf
        if name == "exact":
            counts["solves"] = found.num_solves

    def with_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = torch.from_numpy(w)
        p = torch.sigmoid(-(x @ z))
        return float(f(z)), (-(x.T @ p) / ROWS + L2 * z).numpy()

    options = {"maxiter": 5000, "maxfun": 20000, "gtol": GOAL / COLUMNS**0.5, "ftol": 0, "maxcor": 10}
    found = minimize(with_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    counts["L-BFGS"] = found.nit if np.linalg.norm(found.jac) <= GOAL else math.inf
    counts["cubic"], _ = cubic_newton(x, start)
    return counts


def log_sum_exp_runs() -> dict[str, float]:
    """Iterations to a gap of 1e-6 by each Hessian, and by L-BFGS."""
    m, n, mu, gap = 500, 50, 0.05, 1e-6
    generator = torch.Generator().manual_seed(0)
    A = 2 * torch.rand(m, n, generator=generator, dtype=torch.float64) - 1
    b = 2 * torch.rand(m, generator=generator, dtype=torch.float64) - 1
    A = A - torch.softmax(-b / mu, 0) @ A  # the gradient at 0 is taken off the rows

    def f(x: Tensor) -> Tensor:
        return mu * torch.logsumexp((A @ x - b) / mu, 0)

    def exact(x: Tensor) -> Tensor:
        pi = torch.softmax((A @ x - b) / mu, 0)
        g = A.T @ pi
        return ((A.T * pi) @ A - torch.outer(g, g)) / mu

    best, start = float(f(torch.zeros(n, dtype=torch.float64))), torch.ones(n, dtype=torch.float64)
    hessians = {"exact": exact, "approximate": logsumexp_hessian(A, b, mu), "zero": "zero"}
    counts: dict[str, float] = {}
    for name, hessian in hessians.items():
        gaps: list[float] = []

        def reached(x: Tensor, _step: object, gaps: list[float] = gaps) -> bool:
            gaps.append(float(f(x)) - best)
            return gaps[-1] <= gap

        options = {"max_iterations": 4000, "grad_tolerance": 0.0, "callback": reached}
        gradient_normalized_newton(f, start, hessian=hessian, **options)
        counts[name] = len(gaps) if gaps and gaps[-1] <= gap else math.inf

    def with_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        z = torch.from_numpy(x)
        return float(f(z)), (A.T @ torch.softmax((A @ z - b) / mu, 0)).numpy()

    values: list[float] = []
    minimize(
        with_gradient,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 20000, "gtol": 0, "ftol": 0},
        callback=lambda x: values.append(with_gradient(x)[0] - best),
    )
    counts["L-BFGS"] = next((k + 1 for k, value in enumerate(values) if value <= gap), math.inf)
    return counts


def log_sum_exp_rows() -> list[Row]:
    counts = log_sum_exp_runs()
    print(f"log-sum-exp: {counts}", flush=True)
    what = "iterations, log-sum-exp: "
    near, none = counts["approximate"], counts["zero"]
    return [
        Row(what + "approximate, no Hessian", near, min(none, 1e9), "at most 0.35 times", near <= 0.35 * none),
        Row(what + "exact, approximate", counts["exact"], near, "fewer", counts["exact"] < near),
        Row(what + "exact, L-BFGS", counts["exact"], counts["L-BFGS"], "beside it", True),
        Row(what + "approximate, L-BFGS", near, counts["L-BFGS"], "beside it", True),
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = log_sum_exp_rows()
    for condition in (1.0, 1e4, 1e8):
        x = problem(condition)
        for name, start in (
            ("0", torch.zeros(COLUMNS, dtype=torch.float64)),
            ("far", 10 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
        ):
            counts = runs(x, start)
            print(f"condition {condition:g} from {name}: {counts}", flush=True)
            what = f"iterations, condition {condition:g}, start {name}: exact, "
            for other in ("L-BFGS", "cubic", "Fisher", "diagonal"):
                asked = "fewer" if other in ("L-BFGS", "cubic") else "beside it"
                holds = counts["exact"] <= counts[other] or other in ("Fisher", "diagonal")
                baseline = min(counts[other], 1e9)
                rows.append(Row(what + other, counts["exact"], baseline, asked, holds))
    write_report("newton", rows, {"rows": ROWS, "columns": COLUMNS, "l2": L2, "gradient": GOAL})


if __name__ == "__main__":
    main()
