"""What noise optimization does for the bundled model: rewards climbed, and how many pictures become right.

    python benchmarks/noise_optimization.py [--num-captions 64] [--minutes 25] [--out benchmarks/results]

Held-out captions of two objects and of counts (the compositional ones), in four evaluations of the distilled
transformer or in eight steps with classifier-free guidance at scale 5 (`--full-model`), or in `--steps` of either. The
reward is emoji-clip's; whether a picture is right, `check_scene` decides, which shares no weights with it. Methods make
the same pictures' worth of iterations from the same noise. Captions are run in batches, each by every method, and
written after each, so a run that is stopped goes on where it was and all methods have the same captions. Intervals are
bootstraps over captions.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.assets import asset_path
from trimtab.commands.few_steps import FEW_STEPS_CALL, with_few_steps
from trimtab.commands.pictures import write_json
from trimtab.pipelines import NoiseOptimizationPipeline
from trimtab.recipes.emoji_scenes import altered_captions, check_scene, parse_caption, sample_facts, write_caption

__all__ = ["METHODS", "compositional_captions", "main", "run_cell", "summary", "table"]

SEED = 2025
STEPS, SCALE = 8, 5.0
FULL_MODEL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "max_sequence_length": 16}
DISTILLED: dict[str, Any] = {**FEW_STEPS_CALL, "max_sequence_length": 16}
"""How the model, and its transformer distilled by `trimtab.recipes.distil`, are called."""
CATEGORIES = ("count", "left_right", "above_below")
CHECKPOINTS = (1, 10, 25, 50)
"""Iterations after which the best picture so far is judged."""
METHODS: dict[str, dict[str, Any]] = {
    "best of n": {"optimizer": "best-of-n"},
    "paper": {"preset": "paper"},
    "sphere": {"preset": "sphere"},
    "jacobian-free": {"gradient": "jacobian-free"},
}
RESAMPLES = 2000
_CLOCKS = ("seconds", "cpu_seconds")


def compositional_captions(count: int, *, held_out: bool = True, seed: int = SEED) -> list[str]:
    """Captions of counts and of two objects in a relation, an equal number of each in turn."""
    rng = np.random.default_rng(seed)
    return [write_caption(sample_facts(rng, CATEGORIES[i % len(CATEGORIES)], held_out=held_out)) for i in range(count)]


def load(dtype: str = "float32", *, few_steps: bool = True, reward: str = "clip") -> Any:
    """The bundled model with the bundled reward, on what there is.

    Args:
        dtype: of the model.
        few_steps: with its distilled transformer.
        reward: "clip" for emoji-clip's logit, "contrast" for the caption's log-probability among all captions that
            differ from it in one attribute.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    device = found.type if found else "cpu"
    from diffusers import DiffusionPipeline

    from trimtab.rewards import ContrastReward, load_reward

    scored = load_reward("bundled", device=device)
    if reward == "contrast":
        scored = ContrastReward(scored, functools.cache(altered_captions))
    stock = DiffusionPipeline.from_pretrained(asset_path("emoji-scenes"), dtype=getattr(torch, dtype)).to(device)
    pipe = NoiseOptimizationPipeline.from_pipe(with_few_steps(stock) if few_steps else stock, reward=scored)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_cell(
    pipe: Any,
    captions: Sequence[str],
    first: int,
    method: dict[str, Any],
    iterations: int,
    call: dict[str, Any] = FULL_MODEL,
) -> dict[str, Any]:
    """One method on a batch of captions.

    Args:
        pipe: from `load`.
        captions: of the batch.
        first: number of its first caption: each has a seed of its own.
        method: an entry of `METHODS`.
        iterations: pictures of each caption.
        call: how the model is called.

    Returns:
        `rewards` of each caption's iterations, `right` at each checkpoint, `norms` of the last noise, `seconds` and
        `cpu_seconds`, the latter over all threads: a busy machine doesn't change them.
    """
    started, cpu = time.perf_counter(), time.process_time()
    judged: dict[int, list[bool]] = {}
    rewards, judging = [], np.zeros(2)
    generators = [torch.Generator().manual_seed(SEED + first + row) for row in range(len(captions))]
    for state in pipe.stream(
        list(captions),
        num_optimization_steps=iterations,
        generator=generators,
        **call,
        **method,
    ):
        rewards.append(state.rewards.tolist())
        if state.step + 1 in CHECKPOINTS or state.step + 1 == iterations:
            now = np.array([time.perf_counter(), time.process_time()])
            verdicts = check_scene(state.best_images.float().cpu(), list(captions))
            judged[state.step + 1] = [verdict.correct for verdict in verdicts]
            judging += np.array([time.perf_counter(), time.process_time()]) - now
    return {
        "rewards": [[round(value, 4) for value in row] for row in zip(*rewards, strict=True)],
        "right": judged,
        "norms": [round(value, 4) for value in state.norms.tolist()],
        "seconds": time.perf_counter() - started - judging[0],
        "cpu_seconds": time.process_time() - cpu - judging[1],
    }


def summary(cells: dict[str, dict[str, Any]], captions: Sequence[str]) -> dict[str, Any]:
    """Figures of all methods over the captions that every method has run.

    Args:
        cells: results by "method/first caption".
        captions: all of them.
    """
    methods = list(dict.fromkeys(key.split("/")[0] for key in cells))
    firsts = [{key.split("/")[1] for key in cells if key.startswith(f"{method}/")} for method in methods]
    common = sorted(set.intersection(*firsts), key=int)
    result: dict[str, Any] = {"methods": {}}
    joined: dict[str, dict[str, np.ndarray]] = {}
    for method in methods:
        parts = [cells[f"{method}/{first}"] for first in common]
        checkpoints = sorted(set.intersection(*({int(k) for k in part["right"]} for part in parts)))
        joined[method] = {
            "rewards": _best_so_far([row for part in parts for row in part["rewards"]]),
            **{str(k): np.concatenate([_at(part["right"], k) for part in parts]) for k in checkpoints},
        }
    rows = [int(first) + i for first in common for i in range(len(cells[f"{methods[0]}/{first}"]["rewards"]))]
    result["captions"] = len(rows)
    categories = [_category(captions[row]) for row in rows]
    before = joined[methods[0]]["1"]
    baseline = joined.get("best of n")
    for method in methods:
        values = joined[method]
        last = str(max(int(k) for k in values if k != "rewards"))
        gains = values["rewards"] - values["rewards"][:, :1]
        half = float(gains[:, 9].mean() / gains[:, -1].mean()) if gains.shape[1] > 10 else None
        pictures = gains.shape[1] * len(rows)
        seconds = {name: sum(cells[f"{method}/{first}"][name] for first in common) / pictures for name in _CLOCKS}
        entry = {
            "right": {k: float(values[k].mean()) for k in values if k != "rewards"},
            "right_interval": _interval(values[last]),
            "errors_removed": _removed(before, values[last]),
            "reward": {k: float(values["rewards"][:, int(k) - 1].mean()) for k in values if k != "rewards"},
            "gain_by_iteration_10": half,
            "by_category": {
                name: float(values[last][[category == name for category in categories]].mean())
                for name in CATEGORIES
                if name in categories
            },
            "norm": float(np.mean([v for first in common for v in cells[f"{method}/{first}"]["norms"]])),
            "per_iteration_and_picture": seconds,
        }
        if baseline is not None and method != "best of n" and last in baseline:
            entry["errors_removed_of_best_of_n"] = _removed(baseline[last], values[last])
        result["methods"][method] = entry
    return result


def _best_so_far(rewards: list[list[float]]) -> np.ndarray:
    return np.maximum.accumulate(np.nan_to_num(np.array(rewards), nan=-np.inf), axis=1)


def _at(right: dict[Any, list[bool]], k: int) -> np.ndarray:
    return np.array(right[k] if k in right else right[str(k)], float)


def _category(caption: str) -> str:
    facts = parse_caption(caption)
    if facts.relation is None:
        return "count"
    return "left_right" if facts.relation in ("left", "right") else "above_below"


def _interval(right: np.ndarray) -> list[float]:
    draws = np.random.default_rng(0).integers(len(right), size=(RESAMPLES, len(right)))
    return [float(v) for v in np.percentile(right[draws].mean(1), [2.5, 97.5])]


def _removed(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """The share of errors that are gone, 1 - errors after / errors before, with its interval over captions."""
    draws = np.random.default_rng(0).integers(len(before), size=(RESAMPLES, len(before)))
    errors = (1 - before[draws]).sum(1)
    shares = 1 - (1 - after[draws]).sum(1)[errors > 0] / errors[errors > 0]
    value = 1 - (1 - after).sum() / max((1 - before).sum(), 1)
    interval = np.percentile(shares, [2.5, 97.5]) if len(shares) else (float("nan"),) * 2
    return {"share": float(value), "interval": [float(v) for v in interval]}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{result['captions']} captions; right before: {100 * _first(result):.0f}%",
        "",
        "| method | right at 10 | at 25 | at 50 | errors removed | of best of n's | reward at 10 | at 25 | at 50 "
        "| norm | CPU s / iteration |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, entry in result["methods"].items():

        def cell(values: dict[str, float], k: str, percent: bool) -> str:
            if k not in values:
                return ""
            return f"{100 * values[k]:.0f}%" if percent else f"{values[k]:.2f}"

        right = " | ".join(cell(entry["right"], k, True) for k in ("10", "25", "50"))
        reward = " | ".join(cell(entry["reward"], k, False) for k in ("10", "25", "50"))
        removed, over = entry["errors_removed"], entry.get("errors_removed_of_best_of_n")
        lines.append(
            f"| {method} | {right} | {_share(removed)} | {_share(over) if over else ''} | {reward} | "
            f"{entry['norm']:.2f} | {entry['per_iteration_and_picture']['cpu_seconds']:.2f} |"
        )
    lines += ["", "| method | " + " | ".join(CATEGORIES) + " |", "|---" * (len(CATEGORIES) + 1) + "|"]
    for method, entry in result["methods"].items():
        shares = (entry["by_category"].get(name) for name in CATEGORIES)
        lines.append(f"| {method} | " + " | ".join("" if s is None else f"{100 * s:.0f}%" for s in shares) + " |")
    return "\n".join(lines)


def _first(result: dict[str, Any]) -> float:
    return next(iter(result["methods"].values()))["right"]["1"]


def _share(removed: dict[str, Any]) -> str:
    low, high = removed["interval"]
    return f"{100 * removed['share']:.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-captions", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--minutes", type=float, help="start no further batch after so many")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--full-model", action="store_true", help="the model's own transformer, in guided steps")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 4, with --full-model 8)")
    parser.add_argument("--reward", default="clip", choices=("clip", "contrast"))
    parser.add_argument("--name", default="noise_optimization", help="of the JSON file")
    options = parser.parse_args()
    call = FULL_MODEL if options.full_model else DISTILLED
    if options.steps:
        call = call | {"num_inference_steps": options.steps}
        if "sigmas" in call:
            call["sigmas"] = [1 - step / options.steps for step in range(options.steps)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    settings = {"iterations": options.iterations, "dtype": options.dtype, "reward": options.reward, "call": call}
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if content.get("settings") != settings:
        content = {"settings": settings, "cells": {}}
    captions = compositional_captions(options.num_captions)
    pipe = load(options.dtype, few_steps=not options.full_model, reward=options.reward)
    began = time.perf_counter()
    for first in range(0, len(captions), options.batch_size):
        missing = [method for method in options.methods if f"{method}/{first}" not in content["cells"]]
        if missing and options.minutes and time.perf_counter() - began > 60 * options.minutes:
            break
        for method in missing:
            batch = captions[first : first + options.batch_size]
            cell = run_cell(pipe, batch, first, METHODS[method], options.iterations, call)
            content["cells"][f"{method}/{first}"] = cell
            write_json(path, content)
            print(f"{method}, captions {first} to {first + len(batch) - 1}: {cell['seconds']:.0f} s", flush=True)
    content["summary"] = summary(content["cells"], captions)
    content["machine"] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(pipe.device)}
    write_json(path, content)
    print(table(content["summary"]))


if __name__ == "__main__":
    main()
