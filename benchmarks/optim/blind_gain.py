"""Where blind gain calibration recovers a signal and its sensors' gains: python -m trimtab.benchmarks.optim.blind_gain.

The claim: above a small multiple of the unknowns the recovery is exact, below it fails, as in the paper's phase
transition ("Through the Haze", arXiv:1610.09028), in small: n = 32 unknowns of the signal and m = 16, 32 or 64 gains,
p = 1 to 8 snapshots, gains within 0.5 of 1, five seeds, success where both relative errors are below 1e-3. A run ends
at a loss of 1e-16 or after 5,000 steps: the convergence is linear, and the nearer the transition the slower, so fewer
steps than that (600, say) leave errors of 1e-5 at some seeds where 1,300 leave 1e-7. With noise (n = m = 64, p = 8,
||x|| = 1) the error of x is set beside that of least squares with the gains known.

    python -m trimtab.benchmarks.optim.blind_gain [--seeds 5]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.solvers import calibrate_gains, project_gains

SIGNAL, RHO, LIMIT = 32, 0.5, 5000


def recovery(m: int, p: int, seed: int, rho: float = RHO) -> tuple[float, float, int]:
    """The larger relative error, that of least squares with all gains 1, and the steps."""
    source = torch.Generator().manual_seed(seed)
    A = torch.randn(p, m, SIGNAL, generator=source, dtype=torch.float64)
    x = torch.randn(SIGNAL, generator=source, dtype=torch.float64)
    g = project_gains(1 + rho * (2 * torch.rand(m, generator=source, dtype=torch.float64) - 1), rho)
    y = g * (A @ x)

    def adjoint(r: Tensor) -> Tensor:
        return A.flatten(0, 1).T @ r.flatten()

    found = calibrate_gains(y, lambda v: A @ v, adjoint, tolerance=1e-16, max_iterations=LIMIT)
    error = max(float((found.signal - x).norm() / x.norm()), float((found.gains - g).norm() / g.norm()))
    plain = torch.linalg.lstsq(A.flatten(0, 1), y.flatten()).solution
    return error, float((plain - x).norm() / x.norm()), found.num_iterations


def noisy(sigma: float, seed: int) -> tuple[float, float, float]:
    """Errors of x: of calibration, of least squares with known gains, of least squares with all gains 1."""
    n = m = 64
    source = torch.Generator().manual_seed(seed)
    A = torch.randn(8, m, n, generator=source, dtype=torch.float64)
    x = torch.randn(n, generator=source, dtype=torch.float64)
    x = x / x.norm()
    g = project_gains(1 + RHO * (2 * torch.rand(m, generator=source, dtype=torch.float64) - 1), RHO)
    y = g * (A @ x)
    y = y + sigma * torch.randn(y.shape, generator=source, dtype=torch.float64)
    found = calibrate_gains(y, lambda v: A @ v, lambda r: A.flatten(0, 1).T @ r.flatten(), max_iterations=400)
    plain = torch.linalg.lstsq(A.flatten(0, 1), y.flatten()).solution
    known = torch.linalg.lstsq((g[:, None] * A).flatten(0, 1), y.flatten()).solution
    return tuple(float((v - x).norm()) for v in (found.signal, known, plain))


def noise_rows(seeds: int) -> list[Row]:
    """Robustness to noise as the sheet of the paper asks it."""
    rows = []
    for sigma in (1e-3, 1e-2, 1e-1):
        ours, known, plain = (
            sum(values) / seeds for values in zip(*(noisy(sigma, s) for s in range(seeds)), strict=True)
        )
        print(f"noise {sigma:g}: {ours:.2e}, gains known {known:.2e}, gains 1 {plain:.2e}", flush=True)
        what = f"error of x, noise {sigma:g}; least squares with "
        rows.append(Row(what + "known gains", ours, known, "at most 1.15 times", ours <= 1.15 * known))
        if sigma <= 1e-2:
            rows.append(Row(what + "gains 1", ours, plain, "a tenth", ours <= plain / 10))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    rows = []
    for m in (16, 32, 64):
        for p in (1, 2, 3, 4, 6, 8):
            if m * p < SIGNAL + m:
                continue
            runs = [recovery(m, p, seed) for seed in range(seeds)]
            success = sum(run[0] < 1e-3 for run in runs) / seeds
            ratio = m * p / (SIGNAL + m)
            worst, uncalibrated = max(run[0] for run in runs), sum(run[1] for run in runs) / seeds
            steps = max(run[2] for run in runs)
            print(
                f"m {m} p {p} mp/(n+m) {ratio:.2f}: success {success:.1f}, worst error {worst:.1e}, {steps} steps",
                flush=True,
            )
            what = f"success rate, m = {m}, p = {p}, mp/(n+m) = {ratio:.2f}"
            holds, asked = (success == 1, "1 above 2.6") if ratio > 2.6 else (True, "beside it")
            rows.append(Row(what, success, 0.0, asked, holds))
            if ratio > 2.6:
                what = f"worst error, m = {m}, p = {p}; least squares with gains 1"
                rows.append(Row(what, worst, uncalibrated, "below 1e-6", worst < 1e-6))
    rows += noise_rows(seeds)
    write_report("blind_gain", rows, {"seeds": seeds, "signal": SIGNAL, "rho": RHO, "limit": LIMIT})


if __name__ == "__main__":
    main()
