"""Searches for noise by a reward without a gradient: the share of a caption's attributes that the judge finds right.

The claim: with as many network evaluations, consensus hopping or directional search leaves less wrong than best of n.

    python -m trimtab.benchmarks.optim.search_pipeline [--num-captions 30] [--minutes 50]

The bundled model's distilled transformer makes a picture in one evaluation, so 64 are 64 pictures. One evaluation is
fewer than it was distilled for, and the captions are those that luck leaves wrong: 16 pictures from noises that no
method sees are made first, and a caption is kept if none of them is right. (Of the others, 64 pictures of any method
hold a right one.) The reward is the share of right attributes: background, number, relation, objects, and that nothing
else is there. Every method starts at the same noise. Judged besides: emoji-clip, for which nothing is optimized. The
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
from torch import Tensor

from trimtab.benchmarks.noise_optimization import CATEGORIES, DISTILLED, load
from trimtab.benchmarks.optim.report import RESULTS, Row, print_rows
from trimtab.commands.pictures import write_json
from trimtab.recipes.emoji_scenes import check_scene, sample_facts, write_caption
from trimtab.rewards import CallableReward, RewardModel, load_reward

__all__ = ["METHODS", "main", "right_shares", "run_batch", "summary", "wished_captions"]

SEED = 2027
PICTURES = 64
SCREENING = 16
"""Pictures of which none is right, for a caption to be kept."""
CHECKPOINTS = (16, 32, 64)
ONE_EVALUATION: dict[str, Any] = DISTILLED | {"num_inference_steps": 1, "sigmas": [1.0]}
METHODS: dict[str, dict[str, Any]] = {
    "best of n": {"optimizer": "best-of-n"},
    "diagonal CMA-ES": {"optimizer": "cma", "optimizer_kwargs": {"num_particles": 4}},
    "consensus hopping": {
        "optimizer": "consensus",
        "optimizer_kwargs": {"num_particles": 4, "num_starts": 4, "width": 1.0, "width_end": 0.5, "alpha": math.inf},
    },
    "directional search": {
        "optimizer": "directional",
        "optimizer_kwargs": {"num_starts": 16, "region": 0.5, "r0": 3.0},
    },
}


def right_shares(images: Tensor, prompts: list[str]) -> list[float]:
    """The share of each caption's attributes that the judge finds right: the reward, which has no gradient."""
    return [verdict.right_share for verdict in check_scene(images.float(), prompts)]


def wished_captions(pipe: Any, count: int, *, training: bool = False) -> tuple[list[str], int]:
    """Captions of counts and of two objects in turn, which differ and which `SCREENING` pictures leave wrong.

    Args:
        pipe: whose reward is the share of right attributes.
        count: how many.
        training: of the training kind, from another seed.

    Returns:
        The captions, and how many were looked at.
    """
    rng, kept, seen = np.random.default_rng(SEED + training), [], set()
    while len(kept) < count:
        caption = write_caption(sample_facts(rng, CATEGORIES[len(kept) % len(CATEGORIES)], held_out=not training))
        if caption in seen:
            continue
        seen.add(caption)
        generator = torch.Generator().manual_seed(10_000 * SEED + len(seen))
        made = pipe([caption] * SCREENING, optimizer="best-of-n", num_optimization_steps=1, generator=generator,
                    batch_size=SCREENING, output_type="pt", **ONE_EVALUATION)  # fmt: skip
        if float(made.rewards.max()) < 1:
            kept.append(caption)
    return kept, len(seen)


def run_batch(
    pipe: Any, captions: Sequence[str], first: int, method: dict[str, Any], judge: RewardModel, *, batch_size: int
) -> dict[str, Any]:
    """One method on some captions.

    Args:
        pipe: whose reward is the share of right attributes.
        captions: of the batch.
        first: number of its first caption: each has a seed of its own.
        method: an entry of `METHODS`.
        judge: the reward that nothing is optimized for.
        batch_size: pictures at once.

    Returns:
        `share` and `clip` of each caption's best picture at each checkpoint, and `seconds`.
    """
    began = time.perf_counter()
    generators = [torch.Generator().manual_seed(SEED + first + row) for row in range(len(captions))]
    each = method.get("optimizer_kwargs", {}).get("num_particles", 1)
    run = pipe.stream(
        list(captions),
        num_optimization_steps=PICTURES // each,
        generator=generators,
        batch_size=batch_size,
        **ONE_EVALUATION,
        **method,
    )
    result: dict[str, Any] = {"share": {}, "clip": {}}
    for state in run:
        if state.num_evaluations in CHECKPOINTS:
            pictures, texts = state.best_images.float(), list(captions)
            found = {"share": state.best_rewards.tolist(), "clip": judge(pictures, texts).tolist()}
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
            for what in ("share", "clip"):
                values, base = joined(method, what, at), joined("best of n", what, at)
                entry[at][what] = statistics.fmean(values)
                if method == "best of n":
                    continue
                pairs = [a - b for a, b in zip(values, base, strict=True)]
                mean, error = statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
                entry[at][f"{what}_over_best_of_n"] = [mean, error]
                if what == "share":
                    ours = method != "diagonal CMA-ES"
                    asked = "beyond 2 standard errors" if ours and at == str(PICTURES) else "reported"
                    told = f"right share, {at} pictures, {method} against best of n (+-{error:.3f})"
                    rows.append(Row(told, entry[at][what], statistics.fmean(base), asked,
                                    mean > 2 * error or asked == "reported"))  # fmt: skip
        figures[method] = entry
    return {"captions": len(joined(methods[0], "share", str(PICTURES))), "methods": figures}, rows


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
    settings = {"dtype": options.dtype, "pictures": PICTURES, "call": ONE_EVALUATION, "training": options.training}
    if content.get("settings") != settings:
        content = {"settings": settings, "cells": {}}
    pipe = load(options.dtype)
    judge = load_reward("bundled")
    pipe.reward = CallableReward(right_shares)
    if len(content.get("captions", ())) < options.num_captions:
        content["captions"], content["looked_at"] = wished_captions(
            pipe, options.num_captions, training=options.training
        )
        write_json(path, content)
    captions = content["captions"][: options.num_captions]
    print(f"{len(content['captions'])} of {content['looked_at']} captions have no right one of {SCREENING} pictures")
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
            last = statistics.fmean(cell["share"][str(PICTURES)])
            print(f"{key}: right share {last:.3f}, {cell['seconds']:.0f} s", flush=True)
    content["summary"], rows = summary(content["cells"])
    content["rows"] = [vars(row) for row in rows]
    content["machine"] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": str(pipe.device)}
    write_json(path, content)
    print(json.dumps(content["summary"], indent=1))
    print_rows(rows)


if __name__ == "__main__":
    main()
