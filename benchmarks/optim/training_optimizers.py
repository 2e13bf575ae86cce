"""The training optimizers beside AdamW, torch.optim.Muon and GaLore: loss, state and time on one small pretraining.

    python -m trimtab.benchmarks.optim.training_optimizers [--steps 100] [--folder out/training_optimizers]

A two-layer transformer of width 128 learns the bundled model's latents under the flow-matching loss, with the bundled
text encoders' CLIP features, batch 8, a warm-up of 5 % and half a cosine. The blocks' matrices are trained by the
method, all else by AdamW at the same rate; density 0.25 (rank 32), subspaces for 50 steps, betas (0.9, 0.95), weight
decay 0.01. Each method's rate is the best of one grid on seed 0; then seeds 1, 2, 3, on equal data, twice: at equal
steps, and with as many steps as fit into AdamW's computing time on one thread, the schedule stretched to them. Variants
of a method run at that method's rate. Muon's and LANTON's orthogonalisation is in float32.

State and step time beside torch's own optimizers are measured on the tensors of the bundled transformer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from trimtab.benchmarks.optim.pretraining import METHODS, RATES, Run, block_matrices, load_scenes, pretrain, state_bytes
from trimtab.benchmarks.optim.report import Row, write_report
from trimtab.commands.pictures import write_json
from trimtab.recipes.train_transformer import build_transformer

TUNED = ("AdamW", "Muon", "GaLore", "FRUGAL", "DCT-AdamW", "LANTON")
VARIANTS = {
    "DCT-AdamW, 8-bit feedback": "DCT-AdamW",
    "DCT-AdamW, full feedback": "DCT-AdamW",
    "Trion": "Muon",
    "FRUGAL, dct": "FRUGAL",
    "FRUGAL, density 0": "FRUGAL",
}
SEEDS = (1, 2, 3)
CLAIMS = {
    "Muon": "half of AdamW's on matrices",
    "GaLore": "rank / min(n, m) of AdamW's, 32 of 256 here, and the bases",
    "FRUGAL": "a quarter of AdamW's at density 0.25 (the paper)",
    "FRUGAL, dct": "a quarter of AdamW's; no bases",
    "FRUGAL, density 0": "none on matrices (the paper)",
    "DCT-AdamW": "rank / min(n, m) of AdamW's, 32 of 256 here, and the indices (the paper)",
    "DCT-AdamW, 8-bit feedback": "an eighth of AdamW's more",
    "DCT-AdamW, full feedback": "half of AdamW's more",
    "LANTON": "AdamW's (momentum and the previous gradient)",
    "Trion": "Muon's (the paper)",
}


class Runs:
    """All runs, kept in a file so that an interrupted benchmark goes on."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.json"
        folder.mkdir(parents=True, exist_ok=True)
        rows = json.loads(self.path.read_text())["runs"] if self.path.exists() else []
        self.done = {self._key(Run(**row)): Run(**row) for row in rows}
        self.scenes = load_scenes(folder)

    @staticmethod
    def _key(run: Run) -> tuple:
        return run.method, run.rate, run.steps, run.seed

    def get(self, method: str, rate: float, steps: int, seed: int) -> Run:
        """One run, made where it is missing."""
        key = (method, rate, steps, seed)
        if key not in self.done:
            started = time.time()
            self.done[key] = pretrain(method, rate, steps, seed, *self.scenes)
            write_json(self.path, {"runs": [run.row() for run in self.done.values()]})
            print(f"{key}: {self.done[key].loss:.4f} in {time.time() - started:.0f} s", flush=True)
        return self.done[key]


def tuned_rates(runs: Runs, steps: int) -> dict[str, float]:
    """The best rate of the grid on seed 0; of a run that diverged the loss counts as infinite."""

    def loss(method: str, rate: float) -> float:
        value = runs.get(method, rate, steps, 0).loss
        return value if value == value else float("inf")

    return {method: min(RATES, key=lambda rate: loss(method, rate)) for method in TUNED}


def table(runs: Runs, steps: int) -> list[dict]:
    """One line for each method."""
    rates = tuned_rates(runs, steps)
    base = statistics.median(runs.get("AdamW", rate, steps, 0).seconds_a_step for rate in RATES)
    lines = []
    for method in (*TUNED, *VARIANTS):
        rate = rates[VARIANTS.get(method, method)]
        equal = [runs.get(method, rate, steps, seed) for seed in SEEDS]
        line = {
            "method": method,
            "rate": rate,
            "rate_at_edge": rate in (RATES[0], RATES[-1]),
            "loss": statistics.fmean(run.loss for run in equal),
            "loss_sd": statistics.stdev(run.loss for run in equal),
            "matrix_state_bytes": equal[0].matrix_state_bytes,
            "state_bytes": equal[0].state_bytes,
        }
        lines.append(line)
        print(line, flush=True)
    for line in lines[: len(TUNED)]:
        method, rate = line["method"], line["rate"]
        own = statistics.median(runs.get(method, r, steps, 0).seconds_a_step for r in RATES)
        fitting = steps if method == "AdamW" else max(1, round(steps * base / own))
        timed = [runs.get(method, rate, fitting, seed) for seed in SEEDS]
        line |= {
            "seconds_a_step": own,
            "steps_in_equal_seconds": fitting,
            "loss_in_equal_seconds": statistics.fmean(run.loss for run in timed),
            "loss_in_equal_seconds_sd": statistics.stdev(run.loss for run in timed),
        }
        print(line, flush=True)
    return lines


def _with_gradients(*, layers: int, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    matrices, rest = block_matrices(build_transformer(num_layers=layers, num_attention_heads=heads))
    for p in (*matrices, *rest):
        p.grad = torch.randn_like(p)
    return matrices, rest


def memory_rows() -> list[Row]:
    """Bytes of state on the bundled transformer's tensors, measured after a step, beside AdamW's."""
    rows, base = [], 0.0
    for method, build in METHODS.items():
        matrices, rest = _with_gradients(layers=6, heads=4)
        optimizers = build(matrices, rest, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
        mib = state_bytes(optimizers, matrices) / 2**20
        base = base or mib
        if method != "AdamW":
            what = f"state on the bundled transformer's block matrices, MiB: {method} against AdamW"
            rows.append(Row(what, mib, base, f"claim: {CLAIMS[method]}", mib <= base * 1.01))
    return rows


def time_rows(repeats: int = 5) -> list[Row]:
    """Computing time of a step on one block's tensors, beside AdamW's and torch.optim.Muon's."""
    builds = {"AdamW, foreach": lambda m, rest, lr: [torch.optim.AdamW([*m, *rest], lr, foreach=True)], **METHODS}
    builds["torch.optim.Muon"] = lambda m, rest, lr: [torch.optim.Muon(m, lr), torch.optim.AdamW(rest, lr)]
    times: dict[str, float] = {}
    for method, build in builds.items():
        matrices, rest = _with_gradients(layers=1, heads=4)
        optimizers = build(matrices, rest, 1e-3)
        seconds = []
        for _ in range(2 if method == "torch.optim.Muon" else repeats + 1):
            started = time.process_time()
            for optimizer in optimizers:
                optimizer.step()
            seconds.append(time.process_time() - started)
        times[method] = 1e3 * statistics.median(seconds[1:])  # the first one makes the state
        print(f"{method}: {times[method]:.1f} ms a step", flush=True)
    rows = []
    for method in METHODS:
        for other in ("AdamW", "torch.optim.Muon"):
            if method != other:
                what = f"step on one block of width 256, ms: {method} against {other}"
                rows.append(Row(what, times[method], times[other], "beside it", True))
    return rows


def loss_rows(lines: list[dict]) -> list[Row]:
    """Validation losses beside AdamW's."""
    base, rows = lines[0], []
    for line in lines[1:]:
        method, edge = line["method"], " (rate at the grid's edge)" if line["rate_at_edge"] else ""
        asked = "<= 1.02x" if method == "FRUGAL" else "beside it"
        holds = line["loss"] <= 1.02 * base["loss"] or asked == "beside it"
        rows.append(
            Row(f"validation loss, equal steps: {method}{edge} against AdamW", line["loss"], base["loss"], asked, holds)
        )
        if "loss_in_equal_seconds" in line:
            what = f"validation loss, equal seconds: {method} against AdamW"
            rows.append(Row(what, line["loss_in_equal_seconds"], base["loss_in_equal_seconds"], "beside it", True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run")
    parser.add_argument(
        "--folder", type=Path, default=Path("out/training_optimizers"), help="latents and finished runs"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": options.steps, "rates": RATES, "seeds": SEEDS}
    rows = memory_rows() + time_rows()
    write_report("training_optimizers", rows, settings)  # what the long part below does not change
    lines = table(Runs(options.folder), options.steps)
    write_report("training_optimizers", loss_rows(lines) + rows, {**settings, "table": lines})


if __name__ == "__main__":
    main()
