"""What an iteration of noise optimization costs over the passes that it must make: time and memory.

    OMP_NUM_THREADS=1 python benchmarks/noise_cost.py [--batch-size 8] [--out benchmarks/results]

The bundled model's distilled transformer, four evaluations a picture. Time is the calling thread's, so that other work
on the machine changes it little. Memory is by how much a fresh process grows while two iterations run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.benchmarks.geometry import peak_memory, printed_by
from trimtab.benchmarks.noise_optimization import DISTILLED, compositional_captions, load
from trimtab.commands.pictures import write_json

__all__ = ["grown", "main", "measure_memory", "measure_time"]


def measure_time(pipe: Any, repeats: int = 5) -> dict[str, float]:
    """CPU seconds of an iteration of the full gradient, and of the bare forward and backward passes under it.

    Of the calling thread: use one thread, whose time other work on the machine changes little.
    """
    from trimtab.pipelines import GenerationMap
    from trimtab.pipelines.gradients import blockwise_checkpointed

    captions = compositional_captions(2)
    f = GenerationMap(pipe, captions, output="latent", **DISTILLED)
    start = f.sample_latents(2, [torch.Generator().manual_seed(i) for i in range(2)])
    for part in (pipe.transformer, pipe.vae):
        part.requires_grad_(False)

    def bare() -> None:
        z = start.clone().requires_grad_()
        with blockwise_checkpointed([pipe.vae]):
            pipe.reward(f.decode(f(z)), captions).sum().backward()

    def ours(iterations: int) -> float:
        began = time.thread_time()
        pipe(captions, latents=start, num_optimization_steps=iterations, output_type="latent", **DISTILLED)
        return time.thread_time() - began

    plain, run = [], []
    bare()
    ours(2)
    for _ in range(repeats):
        began = time.thread_time()
        bare()
        plain.append(time.thread_time() - began)
        run.append((ours(6) - ours(2)) / 4)
    for part in (pipe.transformer, pipe.vae):
        part.requires_grad_(True)
    figures = {"bare": statistics.median(plain), "iteration": statistics.median(run)}
    return {**figures, "ratio": statistics.median(a / b for a, b in zip(run, plain, strict=True))}


def grown(batch_size: int, checkpointing: bool) -> float:
    """MB that this process grows by in two iterations of a batch of captions; run it in a fresh one."""
    pipe = load()
    captions = compositional_captions(batch_size)
    options = {"output_type": "latent", "gradient_checkpointing": checkpointing, **DISTILLED}
    pipe(captions[:1], num_optimization_steps=1, **options)  # what is loaded and cached at the first use
    before = peak_memory(reset=True)
    pipe(captions, num_optimization_steps=2, **options)
    return peak_memory() - before


def measure_memory(batch_size: int) -> dict[str, float]:
    """MB of two iterations with checkpointing and without, each in a process of its own, and their ratio."""
    code = "from trimtab.benchmarks.noise_cost import grown; print(grown({}, {}))"
    settings = {"checkpointed": True, "plain": False}
    figures = {name: printed_by(code.format(batch_size, on)) for name, on in settings.items()}
    return {**figures, "ratio": figures["checkpointed"] / figures["plain"]}


def main() -> None:
    """Measures both and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="captions at once, for the memory")
    parser.add_argument("--repeats", type=int, default=5, help="of the times")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    memory = measure_memory(options.batch_size)
    print(json.dumps({"MB": memory}), flush=True)
    seconds = measure_time(load(), options.repeats)
    print(json.dumps({"seconds": seconds}))
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "noise_cost.json", {"MB": memory, "seconds": seconds, "machine": machine})


if __name__ == "__main__":
    main()
