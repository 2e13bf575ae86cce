"""Searches for noise by a reward without a gradient: captions and places of their objects, as `check_scene` finds them.

The claim: with as many network evaluations, consensus hopping or directional search leaves less wrong than best of n.

    python -m trimtab.benchmarks.optim.search_pipeline [--num-captions 30] [--minutes 50]

The bundled model's distilled transformer makes pictures in four evaluations, so 64 are 16 pictures. Best of 16 gets
nearly every held-out caption right, which tells searches apart no more; so each object has a place as well, drawn as
the recipe draws scenes. The reward is the share of right attributes: background, number, relation, that nothing else
is there, and of each stated object how much of its box lies as wished (intersection over union). Every method starts at
the same noise. Judged besides: the share without the places, and emoji-clip, for which nothing is optimized. The
methods' settings were chosen on captions of the training kind (`--training`). Runs go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trimtab.benchmarks.noise_optimization import CATEGORIES, DISTILLED, load
from trimtab.benchmarks.optim.report import RESULTS, Row, print_rows
from trimtab.commands.pictures import write_json
from trimtab.recipes.emoji_scenes import Scene, Verdict, check_scene, sample_scene
from trimtab.rewards import CallableReward, RewardModel, load_reward

__all__ = ["METHODS", "main", "placed_share", "run_batch", "summary", "wished_scenes"]

SEED = 2026
PICTURES = 16
CHECKPOINTS = (8, 16)
METHODS: dict[str, dict[str, Any]] = {
    "best of n": {"optimizer": "best-of-n"},
    "diagonal CMA-ES": {"optimizer": "cma", "optimizer_kwargs": {"num_particles": 4}},
    "consensus hopping": {
        "optimizer": "consensus",
        "optimizer_kwargs": {
            "num_particles": 4,
            "num_starts": 2,
            "region": 0.5,
            "width": 1.0,
            "width_end": 0.7,
            "alpha": math.inf,
        },
    },
    "directional search": {"optimizer": "directional", "optimizer_kwargs": {"num_starts": 8, "region": 0.5, "r0": 3.0}},
}


def wished_scenes(count: int, *, training: bool = False) -> dict[str, Scene]:
    """Scenes of counts and of two objects in turn, by their captions, which differ.

    Args:
        count: how many.
        training: facts of the training kind, from another seed.
    """
    rng, scenes = np.random.default_rng(SEED + training), {}
    while len(scenes) < count:
        scene = sample_scene(rng, category=CATEGORIES[len(scenes) % len(CATEGORIES)], held_out=not training)
        scenes.setdefault(scene.caption, scene)
    return scenes


def placed_share(verdict: Verdict, scene: Scene) -> float:
    """The share of right attributes, of each object the part of its box that lies as in a scene."""
    right = [verdict.background_right, verdict.count_right, verdict.clean]
    right += [] if verdict.relation_right is None else [verdict.relation_right]
    overlaps = np.array([
        [_overlap(wish.box, found.box) if wish.name == found.name else 0.0 for found in verdict.objects]
        for wish in scene.objects
    ]).reshape(len(scene.objects), -1)  # fmt: skip
    matched = overlaps[linear_sum_assignment(overlaps, maximize=True)].sum()
    return (sum(right) + float(matched)) / (len(right) + len(scene.objects))


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Intersection over union of squares (left, top, size)."""
    sides = [max(0, min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    return shared / (a[2] ** 2 + b[2] ** 2 - shared)


def run_batch(
    pipe: Any, captions: Sequence[str], first: int, method: dict[str, Any], judge: RewardModel, *, batch_size: int
) -> dict[str, Any]:
    """One method on some captions.

    Args:
        pipe: whose reward is `placed_share` of each caption's scene.
        captions: of the batch.
        first: number of its first caption: each has a seed of its own.
        method: an entry of `METHODS`.
        judge: the reward that nothing is optimized for.
        batch_size: pictures at once.

    Returns:
        `placed`, `share` and `clip` of each caption's best picture at each checkpoint, and `seconds`.
    """
    began = time.perf_counter()
    generators = [torch.Generator().manual_seed(SEED + first + row) for row in range(len(captions))]
    each = method.get("optimizer_kwargs", {}).get("num_particles", 1)
    run = pipe.stream(
        list(captions),
        num_optimization_steps=PICTURES // each,
        generator=generators,
        batch_size=batch_size,
        **DISTILLED,
        **method,
    )
    result: dict[str, Any] = {"placed": {}, "share": {}, "clip": {}}
    for state in run:
        if state.num_evaluations in CHECKPOINTS:
            pictures, texts = state.best_images.float(), list(captions)
            found = {
                "placed": state.best_rewards.tolist(),
                "share": [verdict.right_share for verdict in check_scene(pictures, texts)],
                "clip": judge(pictures, texts).tolist(),
            }
            for name, values in found.items():
                result[name][str(state.num_evaluations)] = [round(value, 4) for value in values]
    return result | {"seconds": time.perf_counter() - began}


def summary(cells: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[Row]]:
    """Means over the captions that every method has run, and differences to best of n in pairs.

    Args:
        cells: results by "method/first caption".
    """
    methods = list(dict.fromkeys(key.split("/")[0] for key in cells))
    firsts = [{key.split("/")[1] for key in cells if key.startswith(f"{method}/")} for method in methods]
    common = sorted(set.intersection(*firsts), key=int)

    def joined(method: str, what: str, at: str) -> list[float]:
        return [value for first in common for value in cells[f"{method}/{first}"][what].get(at, [])]

    figures: dict[str, Any] = {}
    rows: list[Row] = []
    for method in methods:
        entry: dict[str, Any] = {}
        for at in map(str, CHECKPOINTS):
            entry[at] = {}
            for what in ("placed", "share", "clip"):
                values, base = joined(method, what, at), joined("best of n", what, at)
                entry[at][what] = statistics.fmean(values)
                if method == "best of n":
                    continue
                pairs = [a - b for a, b in zip(values, base, strict=True)]
                mean, error = statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
                entry[at][f"{what}_over_best_of_n"] = [mean, error]
                if what == "placed":
                    ours = method != "diagonal CMA-ES"
                    asked = "beyond 2 standard errors" if ours and at == str(PICTURES) else "reported"
                    told = f"right share with places, {at} pictures, {method} against best of n (+-{error:.3f})"
                    rows.append(Row(told, entry[at][what], statistics.fmean(base), asked,
                                    mean > 2 * error or asked == "reported"))  # fmt: skip
        figures[method] = entry
    return {"captions": len(joined(methods[0], "placed", str(PICTURES))), "methods": figures}, rows


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-captions", type=int, default=30)
    parser.add_argument("--captions-at-once", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--minutes", type=float, help="start nothing more after so many")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--training", action="store_true", help="captions of the training kind, to choose settings on")
    parser.add_argument("--out", type=Path, default=RESULTS / "search_pipeline.json")
    options = parser.parse_args()
    began = time.perf_counter()
    path = options.out
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = {"dtype": options.dtype, "pictures": PICTURES, "call": DISTILLED, "training": options.training}
    if content.get("settings") != settings:
        content = {"settings": settings, "cells": {}}
    pipe = load(options.dtype)
    scenes = wished_scenes(options.num_captions, training=options.training)
    captions, judge = list(scenes), load_reward("bundled")

    def share(images: Tensor, prompts: list[str]) -> list[float]:
        found = check_scene(images.float(), prompts)
        return [placed_share(verdict, scenes[prompt]) for verdict, prompt in zip(found, prompts, strict=True)]

    pipe.reward = CallableReward(share)
    for first in range(0, len(captions), options.captions_at_once):
        for method in options.methods:
            key = f"{method}/{first}"
            late = options.minutes and time.perf_counter() - began > 60 * options.minutes
            told = str(METHODS[method])
            if content["cells"].get(key, {}).get("method") == told or late:
                continue
            batch = captions[first : first + options.captions_at_once]
            cell = run_batch(pipe, batch, first, METHODS[method], judge, batch_size=options.batch_size)
            cell["method"] = told
            content["cells"][key] = cell
            write_json(path, content)
            last = statistics.fmean(cell["placed"][str(PICTURES)])
            print(f"{key}: right share {last:.3f}, {cell['seconds']:.0f} s", flush=True)
    content["summary"], rows = summary(content["cells"])
    content["rows"] = [vars(row) for row in rows]
    content["machine"] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(pipe.device)}
    write_json(path, content)
    print(json.dumps(content["summary"], indent=1))
    print_rows(rows)


if __name__ == "__main__":
    main()
