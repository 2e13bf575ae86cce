"""What ``trimtab generate --input`` costs over a loop that calls the stock pipeline and saves its pictures.

    OMP_NUM_THREADS=1 python -m trimtab.benchmarks.batches [--jobs 16] [--steps 4] [--out benchmarks/results]
    OMP_NUM_THREADS=1 accelerate launch --num_processes 2 --multi_gpu -m trimtab.benchmarks.batches

Both sides in turn, with the bundled model's pipeline loaded once; of several processes each measures its share. Time
is the calling thread's, so that other work on the machine changes it little: use one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import cli
from trimtab.benchmarks.noise_optimization import compositional_captions
from trimtab.commands.generate import GenerateCommand
from trimtab.commands.job_runner import batches_of, run_jobs
from trimtab.commands.model import check_model, load_pipeline
from trimtab.commands.pictures import write_json
from trimtab.commands.processes import Processes

__all__ = ["main", "measure"]

BATCH = 4
SCALE = 5.0


class _Loaded(GenerateCommand):
    """The command with a pipeline that is there already."""

    def __init__(self, args: argparse.Namespace, pipe: Any) -> None:
        super().__init__(args, [], check_model(None))
        self._pipe = pipe

    def load(self, jobs: Sequence[Any], device: str, *, first: bool) -> None:
        pass


def measure(pipe: Any, jobs: int, steps: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of the calling thread for this process's pictures, of both sides in turn.

    Args:
        pipe: the bundled model's.
        jobs: pictures in all.
        steps: of the scheduler.
        repeats: rounds, after one that is not counted.

    Returns:
        ``loop`` and ``runner``, seconds a round; ``ratio``, the median of runner over loop; ``pictures`` a round.
    """
    lines = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(compositional_captions(jobs))]
    spent: dict[str, list[float]] = {"loop": [], "runner": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        flags = ["--guidance", "cfg", "--guidance-scale", str(SCALE), "--steps", str(steps), "--device", "cpu"]
        args = cli._parser().parse_args(["generate", "--input", str(file), *flags])
        command, processes = _Loaded(args, pipe), Processes("cpu")
        mine = processes.share_of(batches_of(command.jobs(Path(folder)), command.group, BATCH))
        for round_ in range(repeats + 1):
            began = time.thread_time()
            _loop(pipe, mine, Path(folder) / f"loop-{processes.number}-{round_}", steps)
            middle = time.thread_time()
            with contextlib.redirect_stdout(io.StringIO()):
                out = Path(processes.shared(folder)) / f"runner-{round_}"
                run_jobs(command, out, batch_size=BATCH, device="cpu", keep_going=True)
            if round_:
                spent["loop"].append(middle - began)
                spent["runner"].append(time.thread_time() - middle)
        processes.wait()
    ratios = [ours / theirs for ours, theirs in zip(spent["runner"], spent["loop"], strict=True)]
    return {**spent, "ratio": statistics.median(ratios), "pictures": sum(map(len, mine)), "process": processes.number}


def _loop(pipe: Any, batches: Sequence[Sequence[Any]], folder: Path, steps: int) -> None:
    """What one writes without this package."""
    folder.mkdir()
    for batch in batches:
        images = pipe(
            prompt=[job.settings["prompt"] for job in batch],
            generator=[torch.Generator().manual_seed(job.settings["seed"]) for job in batch],
            num_inference_steps=steps,
            guidance_scale=SCALE,
            max_sequence_length=16,
        ).images
        for job, image in zip(batch, images, strict=True):
            image.save(folder / f"{job.name}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for batches.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipe = load_pipeline(check_model(None), "float32", "cpu")
    pipe.set_progress_bar_config(disable=True)
    found = measure(pipe, options.jobs, options.steps, options.repeats)
    seconds = {side: statistics.median(found[side]) for side in ("loop", "runner")}
    print(
        f"process {found['process']}: {found['pictures']} pictures of {options.steps} steps in "
        f"{seconds['loop']:.2f} s by a loop, {seconds['runner']:.2f} s by jobs: ratio {found['ratio']:.3f}",
        flush=True,
    )
    if options.out is not None and found["process"] == 0:
        write_json(options.out / "batches.json", {**found, "steps": options.steps})


if __name__ == "__main__":
    main()
