"""Ten pictures from a posterior over noise beside noise optimization from ten seeds and from one.

    python -m trimtab.benchmarks.optim.noise_posterior [--pictures 60] [--num-captions 4] [--minutes 30]

First in closed form: noise of 16 dimensions with two rewarded points, (+-2, 1, 0, ...) of width 1/2, whose evidence is
known: a single Gaussian loses log 2, mixtures of four from spread and from random starts, over seeds.

Then the bundled model's distilled transformer in four evaluations, rewarded by emoji-clip, on held-out captions. Each
method makes the same number of pictures, the fit and its starts included: noise optimization (ReNO's settings) from
ten seeds, a tenth of them each, and its ten best; from one seed, all of them, and its ten best iterates; the posterior,
whose ten pictures are drawn at the end; and the posterior from random starts. The gain is that of the ten pictures'
mean reward over fresh noise's, the diversity the mean of 1 - cosine between their emoji-clip features, and whether they
are right is decided by `check_scene`. Settings were chosen on training captions (`--training`). Results are written
after each cell, and a run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trimtab.benchmarks.noise_optimization import DISTILLED, compositional_captions, load
from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.commands.pictures import write_json
from trimtab.optim import MixtureGuide, fit_mixture, spread_starts
from trimtab.pipelines import NoisePosterior
from trimtab.recipes.emoji_scenes import check_scene

WANTED = 10
SEED = 411
SETTINGS: dict[str, Any] = {
    "num_components": 10,
    "num_starts": 20,
    "num_samples": 1,
    "lr": 0.02,
    "temperature": 0.001,
    "start_scale": 0.2,
}
LOG_Z = 8 * math.log(0.2) - 2
"""Of the two points: log of the integral of N(z; 0, I) times their likelihood, over 16 dimensions."""


def two_points(z: Tensor) -> Tensor:
    """log of the mean of exp(-|z - p|^2 / (2 width^2)) over the two points p, z (S, 16)."""
    places = torch.zeros(2, 16)
    places[:, 0], places[:, 1] = torch.tensor([2.0, -2.0]), 1.0
    return (-2 * (z[:, None] - places).square().sum(2)).logsumexp(1) - math.log(2)


def closed_form(init: str, components: int, seed: int, steps: int) -> float:
    """Bound minus the evidence's logarithm, which is 0 at the posterior."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(256, 16, generator=generator)
    places = list(range(components))
    if init == "spread":
        places = spread_starts(draws, two_points(draws), components, 32)
    guide = MixtureGuide((16,), components, means=draws[places], scale=0.5)
    found = fit_mixture(two_points, guide, num_steps=steps, num_samples=16 // components, lr=0.05, generator=generator)
    return found.bound - LOG_Z


def features(pipe: Any, images: Tensor) -> Tensor:
    """(N, d) emoji-clip's, of length 1."""
    return normalize(pipe.reward.image_features(images).float(), dim=1)


def diversity(found: Tensor) -> float:
    """The mean of 1 - cosine over pairs of features (N, d) of length 1."""
    alike = found @ found.T
    count = len(found)
    return float(1 - (alike.sum() - alike.trace()) / (count * (count - 1)))


@torch.no_grad()
def judged(pipe: Any, images: Tensor, caption: str) -> dict[str, Any]:
    """What ten pictures are worth."""
    texts = [caption] * len(images)
    return {
        "reward": float(pipe.reward(images, texts).mean()),
        "diversity": diversity(features(pipe, images)),
        "right": sum(bool(verdict.correct) for verdict in check_scene(images.float().cpu(), texts)) / len(images),
    }


def from_seeds(pipe: Any, caption: str, number: int, pictures: int, seeds: int) -> dict[str, Any]:
    """Noise optimization from ten seeds, or from one whose ten best iterates count."""
    generators = [torch.Generator().manual_seed(SEED + 100 * number + row) for row in range(seeds)]
    seen, first = [], 0.0
    for state in pipe.stream(
        [caption] * seeds, num_optimization_steps=pictures // seeds, generator=generators, batch_size=10, **DISTILLED
    ):
        if state.step == 0:
            first = float(state.rewards.mean())
        if seeds == 1:
            seen.append((float(state.rewards[0]), state.images[0]))
    best = state.best_images
    if seeds == 1:
        best = torch.stack([image for _, image in sorted(seen, key=lambda pair: -pair[0])[:WANTED]])
    return {**judged(pipe, best, caption), "first": first}


def from_posterior(
    pipe: Any, caption: str, number: int, pictures: int, init: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Ten draws after a fit that leaves as many pictures for them."""
    given = dict(settings)
    made = {name: given.pop(name) for name in ("num_components", "temperature")}
    starts = given["num_starts"] if init == "spread" else 0
    steps = (pictures - WANTED - starts) // (made["num_components"] * given["num_samples"])
    generator = torch.Generator().manual_seed(SEED + 100 * number + 50)
    posterior = NoisePosterior(pipe, caption, batch_size=10, **made, **DISTILLED)
    found = posterior.fit(num_steps=steps, init=init, generator=generator, **given)
    images = posterior.sample(WANTED, generator, output_type="pt")
    # One component alone: what a user gets who wants more pictures than there are components.
    with torch.no_grad():
        posterior.guide.logits[posterior.guide.weights.argmax()] = 50.0
    alone = diversity(features(pipe, posterior.sample(4, generator, output_type="pt")))
    return {
        **judged(pipe, images, caption),
        "evaluations": found.num_evaluations + WANTED,
        "bound_rose": float(found.history[-1] - found.history[0]),
        "ess": found.ess,
        "within_one_component": alone,
    }


def cells_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The methods by name."""
    return {
        "ten seeds": lambda *given: from_seeds(*given, WANTED),
        "posterior": lambda *given: from_posterior(*given, "spread", settings),
        "one seed": lambda *given: from_seeds(*given, 1),
        "random start": lambda *given: from_posterior(*given, "random", settings),
    }


def rows_of(cells: dict[str, dict[str, Any]], closed: dict[str, list[float]]) -> list[Row]:
    """The claims, over the captions that all methods have run."""
    return [*(_closed_rows(**closed) if closed else []), *_picture_rows(cells)]


def _closed_rows(single: list[float], spread: list[float], random: list[float]) -> list[Row]:
    collapsed = sum(gap < -0.35 for gap in random)
    return [
        Row("closed form: one Gaussian's bound less log Z", min(single), -math.log(2), "-log 2",
            abs(min(single) + math.log(2)) < 0.05),
        Row("closed form: the worst of four components, spread", min(spread), -0.1, "above", min(spread) > -0.1),
        Row("closed form: runs that collapse from random starts", collapsed, len(random), "reported", True),
    ]  # fmt: skip


def _picture_rows(cells: dict[str, dict[str, Any]]) -> list[Row]:
    mean, captions = _means(cells, ("ten seeds", "posterior", "one seed"))
    if not captions:
        return []
    ten, ours, one = mean.values()
    gain = {name: values["reward"] - ten["first"] for name, values in mean.items()}
    rows = [
        Row(f"reward gain beside ten seeds', {captions} captions", gain["posterior"], gain["ten seeds"], ">= 80 %",
            gain["posterior"] >= 0.8 * gain["ten seeds"]),
        Row("diversity beside ten seeds'", ours["diversity"], ten["diversity"], ">= 0.9x",
            ours["diversity"] >= 0.9 * ten["diversity"]),
        Row("diversity beside one seed's", ours["diversity"], one["diversity"], ">= 2x",
            ours["diversity"] >= 2 * one["diversity"]),
        Row("reward gain of one seed beside ten seeds'", gain["one seed"], gain["ten seeds"], "reported", True),
        Row("diversity within one component beside all", ours["within_one_component"], ours["diversity"], "reported",
            True),
        Row("share of right pictures beside ten seeds'", ours["right"], ten["right"], "reported", True),
    ]  # fmt: skip
    mean, captions = _means(cells, ("random start", "posterior", "ten seeds"))
    if captions:
        random, spread, ten = mean.values()
        rows += [
            Row(f"from random starts: reward gain beside spread's, {captions} captions",
                random["reward"] - ten["first"], spread["reward"] - ten["first"], "reported", True),
            Row("from random starts: diversity beside spread's", random["diversity"], spread["diversity"], "reported",
                True),
        ]  # fmt: skip
    return rows


def _means(cells: dict[str, dict[str, Any]], methods: tuple[str, ...]) -> tuple[dict[str, dict[str, float]], int]:
    """Each method's figures over the captions that all of these have run, and how many there are."""
    names = [{key.split("/")[1] for key in cells if key.startswith(f"{method}/")} for method in methods]
    common = sorted(set.intersection(*names))
    found = {
        method: {
            name: sum(cells[f"{method}/{key}"][name] for key in common) / len(common)
            for name in cells[f"{method}/{common[0]}"]
        }
        for method in methods
        if common
    }
    return found, len(common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60, help="of each method and caption")
    parser.add_argument("--num-captions", type=int, default=4)
    parser.add_argument("--minutes", type=float, help="start no further cell after so many")
    parser.add_argument("--training", action="store_true", help="on training captions, for choosing settings")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="another setting of the posterior's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = {**SETTINGS, **{name: json.loads(value) for name, value in (pair.split("=") for pair in options.set)}}
    about = {"pictures": options.pictures, "posterior": settings, "call": DISTILLED, "training": options.training}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "noise_posterior.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    kept = content.get("settings", {})
    others = {name: value for name, value in about.items() if name != "posterior"}
    cells = kept.get("cells", {}) if {name: kept.get(name) for name in others} == others else {}
    if kept.get("posterior") != settings:  # noise optimization's don't depend on them
        cells = {key: value for key, value in cells.items() if "seed" in key}
    closed = kept.get("closed_form") or {}
    rows: list[Row] = []

    def keep() -> None:
        nonlocal rows
        rows = rows_of(cells, closed)
        write_json(
            path, {"settings": {**about, "cells": cells, "closed_form": closed}, "rows": [vars(r) for r in rows]}
        )

    keep()
    captions = compositional_captions(options.num_captions, held_out=not options.training, seed=SEED)
    began, pipe, methods = time.monotonic(), load("float32"), cells_of(settings)
    for number, caption in enumerate(captions):
        for name in options.methods or methods:
            if f"{name}/{number}" in cells or (options.minutes and time.monotonic() - began > 60 * options.minutes):
                continue
            cpu = time.process_time()
            cells[f"{name}/{number}"] = methods[name](pipe, caption, number, options.pictures)
            keep()
            print(f"{name}/{number} {caption}: {json.dumps(cells[f'{name}/{number}'])} "
                  f"{time.process_time() - cpu:.0f} s of CPU", flush=True)  # fmt: skip
    if not closed and not options.training:
        closed |= {
            "single": [closed_form("spread", 1, 0, 300)],
            "spread": [closed_form("spread", 4, seed, 300) for seed in range(4)],
            "random": [closed_form("random", 4, seed, 300) for seed in range(8)],
        }
        keep()
    write_report("noise_posterior", rows, {**about, "cells": cells, "closed_form": closed}, options.out)


if __name__ == "__main__":
    main()
