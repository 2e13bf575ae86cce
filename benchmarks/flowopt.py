"""How fast FlowOpt inverts pictures, and what it costs beside the network: the bundled model in float32.

    trimtab bench editing --parts residuals psnr time memory [--num-pictures 64]

The pictures are the sources of the edit benchmark, the prompts their captions, ten steps of Euler's method without
guidance. `residuals`: root mean square of f(x_k) - y against the passes through the sampler after Uni-Inv's start, of
the paper's update at three step sizes and of the accelerated ones at one setting for all pictures. `psnr`: of the
reconstruction, against the round trip of the autoencoder. `time`: a run against the same network calls alone.
`memory`: the most that is alive in a run against sampling alone.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.benchmarks.editing_scenes import edit_cases
from trimtab.pipelines import FlowOptPipeline, GenerationMap
from trimtab.pipelines.flowopt_choice import psnr

__all__ = ["PARTS", "PeakMemory", "measure_memory", "measure_psnr", "measure_residuals", "measure_time", "run"]

STEPS = 10
PLAIN_STEP_SIZES = (0.4, 0.8, 1.2)  # smaller ones are slower, larger ones diverge
ITERATIONS = 16
TEXT = {"max_sequence_length": 16}


def load_pictures(count: int) -> tuple[torch.Tensor, list[str]]:
    """(count, 3, 128, 128) in [0, 1], the sources of the edit benchmark, and their captions."""
    scenes = [case.source for case in edit_cases(count)]
    pictures = torch.stack([torch.from_numpy(scene.render()).movedim(-1, 0) for scene in scenes])
    return pictures.float(), [scene.caption for scene in scenes]


def batches(pictures: torch.Tensor, captions: list[str], size: int = 16) -> list[tuple[torch.Tensor, list[str]]]:
    """Pictures and captions, `size` at a time."""
    return [(pictures[i : i + size], captions[i : i + size]) for i in range(0, len(pictures), size)]


def measure_residuals(pipe: Any, pictures: torch.Tensor, captions: list[str]) -> dict[str, Any]:
    """Median residuals over the pictures, after each iteration, with the passes that they took.

    Returns:
        For each method its name, `passes` (evaluations after the start, over the steps of a pass) and `residuals`;
        and, against the best of the paper's update at 8 and at 16 iterations, the passes that each takes to it and
        its residual at 16 passes.
    """
    settings: dict[str, dict[str, Any]] = {
        **{f"plain {eta:g}": {"acceleration": "none", "step_size": eta} for eta in PLAIN_STEP_SIZES},
        "anderson": {"acceleration": "anderson"},
        "inverse": {"acceleration": "inverse"},
    }
    curves = {}
    for name, options in settings.items():
        steps = ITERATIONS // 2 if name == "inverse" else ITERATIONS  # two passes each
        parts = []
        for images, prompts in batches(pictures, captions):
            run = pipe.invert(
                images, prompts, num_inference_steps=STEPS, num_optimization_steps=steps, keep_history=True,
                output_type="latent", **options, **TEXT,
            )  # fmt: skip
            evaluations = [state.num_function_evaluations for state in run.history]
            parts.append(torch.stack([state.residuals for state in run.history]))
        start = 2 * STEPS + 1  # Uni-Inv and the first pass
        passes = [(count - start) / STEPS for count in evaluations]
        residuals = _ended(parts).median(1).values
        curves[name] = {"passes": passes, "residuals": [round(value, 6) for value in residuals.tolist()]}
        print(
            f"{name:<12}" + " ".join(f"{r:.4f}@{p:g}" for p, r in zip(passes, curves[name]["residuals"], strict=True)),
            flush=True,
        )
    report: dict[str, Any] = {"curves": curves}
    plain = [curve for name, curve in curves.items() if name.startswith("plain")]
    for iterations in (8, 16):
        best = min(curve["residuals"][min(iterations, len(curve["residuals"]) - 1)] for curve in plain)
        report[f"plain_best_{iterations}"] = best
    for name in ("anderson", "inverse"):
        curve = curves[name]
        reached = [p for p, r in zip(curve["passes"], curve["residuals"], strict=True) if r <= report["plain_best_8"]]
        within = [r for p, r in zip(curve["passes"], curve["residuals"], strict=True) if p <= 16]
        report[name] = {
            "passes_to_plain_best_8": reached[0] if reached else None,
            "share_of_passes": reached[0] / 8 if reached else None,
            "residual_at_16_over_plain": within[-1] / report["plain_best_16"],
        }
    return report


def _ended(parts: list[torch.Tensor]) -> torch.Tensor:
    """(iterations, pictures) from batches, of which some may have ended sooner, at their best."""
    longest = max(map(len, parts))
    return torch.cat([torch.cat([part, part[-1:].expand(longest - len(part), -1)]) for part in parts], 1)


def measure_psnr(pipe: Any, pictures: torch.Tensor, captions: list[str]) -> dict[str, Any]:
    """Mean PSNR of the reconstructions after each iteration, against the autoencoder's round trip.

    Returns:
        `ceiling` in dB, and for each acceleration `evaluations`, `psnr`, and the `evaluations_within_1_db`.
    """
    vae, dtype = pipe.vae, pipe.vae.dtype
    rounds = []
    for images, _ in batches(pictures, captions):
        latents = vae.encode((images * 2 - 1).to(vae.device, dtype)).latent_dist.mode()
        rounds.append(psnr((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu(), images))
    report: dict[str, Any] = {"ceiling": torch.cat(rounds).mean().item()}
    for acceleration, steps in (("none", 8), ("anderson", 8), ("inverse", 4)):
        values = []
        for images, prompts in batches(pictures, captions):
            run = pipe.invert(
                images, prompts, num_inference_steps=STEPS, num_optimization_steps=steps, keep_history=True,
                acceleration=acceleration, output_type="latent", **TEXT,
            )  # fmt: skip
            evaluations = [state.num_function_evaluations for state in run.history]
            values.append(torch.stack([psnr(state.images, images) for state in run.history]))
        means = _ended(values).mean(1).tolist()
        near = [n for n, value in zip(evaluations, means, strict=True) if value >= report["ceiling"] - 1]
        report[acceleration] = {
            "evaluations": evaluations,
            "psnr": [round(value, 3) for value in means],
            "evaluations_within_1_db": near[0] if near else None,
        }
    return report


def measure_time(pipe: Any, pictures: torch.Tensor, captions: list[str], repeats: int = 15) -> dict[str, float]:
    """Time of the iterations against the same calls of the network by themselves, alternating.

    On a GPU the time on the wall; else the computing time of one thread, which other work on the machine leaves alone.

    Returns:
        `ratio`, the median over the repeats, and the medians of both in seconds.
    """
    images, prompts = pictures[:4], captions[:4]
    network, calls = pipe.transformer, []
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )

    def stream() -> Any:
        return pipe.stream(
            images, prompts, source_prompt=prompts, num_inference_steps=STEPS, num_optimization_steps=3,
            guidance_scale=1.0, strength=1.0, step_size=0.1, acceleration="anderson", **TEXT,
        )  # fmt: skip

    for _ in stream():
        pass
    hook.remove()
    runs, bare, threads = [], [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            prepared = stream()  # prompts and pictures are encoded here
            runs.append(_seconds(lambda states=prepared: [None for _ in states]))
            bare.append(_seconds(lambda: [network(*args, **kwargs) for args, kwargs in calls]))
    finally:
        torch.set_num_threads(threads)
    ratio = statistics.median(run / alone for run, alone in zip(runs, bare, strict=True))
    return {"ratio": ratio, "run_seconds": statistics.median(runs), "network_seconds": statistics.median(bare)}


def _seconds(work: Callable[[], Any]) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    _synchronize()
    start = clock()
    with torch.no_grad():
        work()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once, on any device.

    Attributes:
        peak: in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self._take(value.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


def measure_memory(pipe: Any, pictures: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Peak of a run's iterations against that of sampling with the same batch, prompts encoded before both.

    Each picture's best state so far, two latents, lies on the host: on a GPU it isn't in the device's memory, on a CPU
    it is counted with the rest.

    Returns:
        Both in bytes, their `ratio`, and the difference in `latents` of float32.
    """
    images, prompts = pictures[:8], captions[:8]
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, **TEXT}
    f = GenerationMap(pipe, prompts, output="latent", **options)
    noise = f.sample_latents(len(prompts), torch.Generator().manual_seed(0))
    with PeakMemory() as sampling:
        f(noise)
    peaks = {}
    for acceleration in ("none", "anderson", "inverse"):
        states = pipe.stream(
            images, prompts, source_prompt=prompts, num_optimization_steps=3, strength=1.0, step_size=0.1,
            acceleration=acceleration, **options,
        )  # fmt: skip
        with PeakMemory() as editing:
            while next(states, None) is not None:  # a loop's variable would keep the state before
                pass
        peaks[acceleration] = editing.peak
    latent = noise.numel() * 4
    report = {"sampling_bytes": sampling.peak, "latent_bytes": latent}
    for acceleration, peak in peaks.items():
        report[acceleration] = {
            "bytes": peak,
            "ratio": peak / sampling.peak,
            "latents": (peak - sampling.peak) / latent,
        }
    return report


PARTS = {
    "residuals": measure_residuals,
    "psnr": measure_psnr,
    "time": measure_time,
    "memory": measure_memory,
}


def run(pipe: Any, parts: Sequence[str], *, num_pictures: int, path: Path) -> dict[str, Any]:
    """Measures, prints and writes the figures after each part.

    Args:
        pipe: a stock pipeline.
        parts: of `PARTS`.
        num_pictures: sources of the edit benchmark.
        path: of the JSON file, whose other parts stay.

    Returns:
        What the file holds.
    """
    pipe = FlowOptPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    pictures, captions = load_pictures(num_pictures)
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in parts:
        with torch.no_grad():
            report[part] = {"num_pictures": len(pictures), **PARTS[part](pipe, pictures, captions)}
        shown = {key: value for key, value in report[part].items() if key != "curves"}
        print(part, json.dumps(shown, indent=2), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return report
