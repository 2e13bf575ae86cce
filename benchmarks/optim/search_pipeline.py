"""Searches for noise by a reward without a gradient: how much of a caption is right, as `check_scene` finds it.

The claim: with as many pictures, consensus hopping or directional search leaves less wrong than best of n.

    python -m trimtab.benchmarks.optim.search_pipeline [--num-captions 30] [--minutes 50]

The bundled model in four evaluations. Captions are held-out ones of counts and of two objects that the model finds
hard: none of four pictures of another seed is all right. (Best of n gets nearly every other caption right, and nothing
is left to tell searches apart.) Every method starts at the same noise and makes 64 pictures, of which the one with the
largest share of right attributes is the result; the figures after 16 pictures are those of 64 network evaluations.
emoji-clip, which nothing is optimized for, is the second judge. Runs go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trimtab.benchmarks.noise_optimization import DISTILLED, compositional_captions, load
from trimtab.benchmarks.optim.report import RESULTS, Row, print_rows
from trimtab.commands.pictures import write_json
from trimtab.recipes.emoji_scenes import check_scene
from trimtab.rewards import RewardModel, load_reward

__all__ = ["METHODS", "hard_captions", "main", "run_batch", "summary"]

SEED = 2026
PICTURES = 64
SCREENED = 4
CHECKPOINTS = (1, 16, 32, 64)
METHODS: dict[str, dict[str, Any]] = {
    "best of n": {"optimizer": "best-of-n"},
    "diagonal CMA-ES": {"optimizer": "cma", "optimizer_kwargs": {"num_particles": 8}},
    "consensus hopping": {
        "optimizer": "consensus",
        "optimizer_kwargs": {"num_particles": 8, "width": 0.8, "width_end": 0.4},
    },
    "directional search": {"optimizer": "directional"},
}


def hard_captions(
    pipe: Any, pool: Sequence[str], count: int, batch_size: int, seen: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The first captions of a pool that the model draws wrong `SCREENED` times; gives what was seen after each batch.

    Args:
        pipe: from `load`.
        pool: captions in order.
        count: how many are wanted.
        batch_size: pictures at once.
        seen: how many of the pool were looked at before, and the captions found.
    """
    found = list(seen["captions"])
    for first in range(seen["screened"], len(pool), batch_size):
        if len(found) >= count:
            return
        batch = list(pool[first : first + batch_size])
        wrong = [True] * len(batch)
        for turn in range(SCREENED):
            generators = [torch.Generator().manual_seed(10_000 * (turn + 1) + first + i) for i in range(len(batch))]
            with torch.no_grad():
                images = pipe.generate(batch, generator=generators, output_type="pt", **DISTILLED).images
            verdicts = check_scene(images.float(), batch)
            wrong = [before and not verdict.correct for before, verdict in zip(wrong, verdicts, strict=True)]
            if not any(wrong):
                break
        found += [caption for caption, hard in zip(batch, wrong, strict=True) if hard]
        yield {"screened": first + len(batch), "captions": found[:count]}


def run_batch(
    pipe: Any, captions: Sequence[str], first: int, method: dict[str, Any], judge: RewardModel, *, batch_size: int
) -> dict[str, Any]:
    """One method on some captions.

    Args:
        pipe: whose reward is "right-share".
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
        **DISTILLED,
        **method,
    )
    result: dict[str, Any] = {"share": {}, "clip": {}}
    for state in run:
        if state.num_evaluations in CHECKPOINTS:
            at = str(state.num_evaluations)
            result["share"][at] = [round(value, 4) for value in state.best_rewards.tolist()]
            values = judge(state.best_images.float(), list(captions))
            result["clip"][at] = [round(value, 4) for value in values.tolist()]
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
            share, base = joined(method, "share", at), joined("best of n", "share", at)
            if not share:
                continue
            entry[at] = {
                "right_share": statistics.fmean(share),
                "all_right": statistics.fmean(float(value == 1) for value in share),
                "emoji_clip": statistics.fmean(joined(method, "clip", at)),
            }
            if method == "best of n":
                continue
            for name, pairs in (
                ("right_share", [a - b for a, b in zip(share, base, strict=True)]),
                ("all_right", [float(a == 1) - float(b == 1) for a, b in zip(share, base, strict=True)]),
            ):
                mean, error = statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
                entry[at][f"{name}_over_best_of_n"] = [mean, error]
            mean, error = entry[at]["right_share_over_best_of_n"]
            asked = "beyond 2 standard errors" if method != "diagonal CMA-ES" else "reported"
            holds = mean > 2 * error or method == "diagonal CMA-ES"
            before = statistics.fmean(base)
            if at in ("16", "64"):
                what = f"right share after {at} pictures, {method} against best of n (+-{error:.3f})"
                rows.append(Row(what, statistics.fmean(share), before, asked, holds))
        figures[method] = entry
    return {"captions": len(joined(methods[0], "share", "1")), "methods": figures}, rows


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-captions", type=int, default=30)
    parser.add_argument("--captions-at-once", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--minutes", type=float, help="start nothing more after so many")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    began = time.perf_counter()
    path = RESULTS / "search_pipeline.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = {"dtype": options.dtype, "pictures": PICTURES, "call": DISTILLED}
    if content.get("settings") != settings:
        content = {"settings": settings, "cells": {}}
    pipe = load(options.dtype)
    pipe.reward, judge = load_reward("right-share"), load_reward("bundled")
    seen = content.setdefault("screening", {"screened": 0, "captions": []})
    pool = list(dict.fromkeys(compositional_captions(3000, seed=SEED)))
    for progress in hard_captions(pipe, pool, options.num_captions, options.batch_size, seen):
        content["screening"] = progress
        write_json(path, content)
    captions = content["screening"]["captions"]
    for first in range(0, len(captions), options.captions_at_once):
        for method in options.methods:
            key = f"{method}/{first}"
            late = options.minutes and time.perf_counter() - began > 60 * options.minutes
            if key in content["cells"] or late:
                continue
            batch = captions[first : first + options.captions_at_once]
            cell = run_batch(pipe, batch, first, METHODS[method], judge, batch_size=options.batch_size)
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
