"""Where blind gain calibration recovers a signal and its sensors' gains: python -m trimtab.benchmarks.optim.blind_gain.

The claim: above a small multiple of the unknowns the recovery is exact, below it fails, as in the paper's phase
transition ("Through the Haze", arXiv:1610.09028), in small: n = 32 unknowns of the signal and m = 16, 32 or 64 gains,
p = 1 to 8 snapshots, gains within 0.5 of 1, five seeds, success where both relative errors are below 1e-3.

    python -m trimtab.benchmarks.optim.blind_gain [--seeds 5]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.optim.solvers import calibrate_gains, project_gains

SIGNAL, RHO = 32, 0.5


def recovery(m: int, p: int, seed: int, rho: float = RHO) -> tuple[float, float, int]:
    """The larger relative error, that of least squares with all gains 1, and the steps."""
    source = torch.Generator().manual_seed(seed)
    A = torch.randn(p, m, SIGNAL, generator=source, dtype=torch.float64)
    x = torch.randn(SIGNAL, generator=source, dtype=torch.float64)
    g = project_gains(1 + rho * (2 * torch.rand(m, generator=source, dtype=torch.float64) - 1), rho)
    y = g * (A @ x)

    def adjoint(r: Tensor) -> Tensor:
        return A.flatten(0, 1).T @ r.flatten()

    found = calibrate_gains(y, lambda v: A @ v, adjoint, tolerance=1e-16, max_iterations=600)
    error = max(float((found.signal - x).norm() / x.norm()), float((found.gains - g).norm() / g.norm()))
    plain = torch.linalg.lstsq(A.flatten(0, 1), y.flatten()).solution
    return error, float((plain - x).norm() / x.norm()), found.num_iterations


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
            print(f"m {m} p {p} mp/(n+m) {ratio:.2f}: success {success:.1f}, worst error {worst:.1e}", flush=True)
            what = f"success rate, m = {m}, p = {p}, mp/(n+m) = {ratio:.2f}"
            holds, asked = (success == 1, "1 above 2.6") if ratio > 2.6 else (True, "beside it")
            rows.append(Row(what, success, 0.0, asked, holds))
            if ratio > 2.6:
                what = f"worst error, m = {m}, p = {p}; least squares with gains 1"
                rows.append(Row(what, worst, uncalibrated, "below 1e-6", worst < 1e-6))
    write_report("blind_gain", rows, {"seeds": seeds, "signal": SIGNAL, "rho": RHO})


if __name__ == "__main__":
    main()
