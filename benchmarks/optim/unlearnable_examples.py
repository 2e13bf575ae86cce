"""What protected examples do to a classifier: accuracy on clean test data, by cloak and by how many are cloaked.

    python -m trimtab.benchmarks.optim.unlearnable_examples [--seeds 4] [--scene-seeds 2] [--minutes 30]

Four Gaussian classes in [0, 1]^64 (means .5 + .045 N(0, 1), noise .12) within 8/255, a network 64-64, 800 examples of
which none, half or all are cloaked, beside the 400 clean ones alone. Cloaks: random signs, error-minimising noise
(Huang et al., arXiv 2101.04898), and Bayes error optimisation (`cloak`) by pixels and by features refitted in each
outer step. Then the same table on crops of EmojiScenes, 16 x 16 pixels of four animals on any ground, at 4, 8 and
16/255. Each cell is written when it is there, and a run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.commands.pictures import write_json
from trimtab.optim import bayes_error, cloak
from trimtab.optim.protect import round_towards
from trimtab.recipes.emoji_scenes import BACKGROUNDS, Scene, SceneObject

ANIMALS = ("cat", "dog", "fox", "lion")
CLASSES = 4
Data = tuple[Tensor, Tensor]


def gaussians(seed: int, count: int = 800) -> tuple[Data, Data]:
    """Training and test data: (N, 1, 8, 8) in multiples of 1/255, and labels."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.5 + 0.045 * torch.randn(CLASSES, 64, generator=generator)

    def draw(number: int) -> Data:
        y = torch.arange(number) % CLASSES
        x = means[y] + 0.12 * torch.randn(number, 64, generator=generator)
        return (x.clamp(0, 1) * 255).round().reshape(number, 1, 8, 8) / 255, y

    return draw(count), draw(4000)


def crops(seed: int, count: int = 400) -> tuple[Data, Data]:
    """The same of EmojiScenes: (N, 3, 16, 16), an animal of any size and place on any ground."""
    rng, grounds = np.random.default_rng(seed), tuple(BACKGROUNDS)

    def draw(number: int) -> Data:
        y, pictures = torch.arange(number) % CLASSES, []
        for label in y.tolist():
            size = int(rng.integers(40, 80))
            left, top = (int(v) for v in rng.integers(0, 128 - size, 2))
            ground, gradient = grounds[rng.integers(len(grounds))], float(rng.uniform(-0.06, 0.06))
            picture = Scene((SceneObject(ANIMALS[label], (left, top, size)),), ground, gradient).render(128)
            x, y0 = (int(np.clip(v + size // 2 - 32 + rng.integers(-12, 13), 0, 64)) for v in (left, top))
            pictures.append(torch.from_numpy(picture[y0 : y0 + 64, x : x + 64]).permute(2, 0, 1))
        small = interpolate(torch.stack(pictures), (16, 16), mode="area")
        return (small * 255).round() / 255, y

    return draw(count), draw(1000)


def network(size: int) -> nn.Sequential:
    """Two hidden layers of 64."""
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def trained(x: Tensor, y: Tensor, seed: int, epochs: int = 60) -> nn.Sequential:
    """A network by AdamW, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(x[0].numel())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(x) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model((x[rows] - 0.5) * 4), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module, data: Data) -> float:
    return float((model((data[0] - 0.5) * 4).argmax(1) == data[1]).float().mean())


def random_signs(x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return round_towards(x + eps * signs, x, eps)


def error_minimising(x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    """Ten times in turn: a network trained on what there is, and fifteen signed steps down its loss."""
    moved = x.clone()
    for outer in range(10):
        model = trained(moved, y, seed + outer, epochs=10)
        for _ in range(15):
            leaf = moved.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model((leaf - 0.5) * 4), y, reduction="sum"), leaf)
            moved = (moved - eps / 5 * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return round_towards(moved, x, eps)


def by_pixels(x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return cloak(x, y, eps=eps, bandwidth=width_of(x), outer_steps=10, inner_steps=15, generator=generator).images


def width_of(x: Tensor) -> Any:
    """The kernel's: the paper's in few dimensions; in many it would see nearest neighbours alone."""
    return 0.3 if x[0].numel() <= 64 else "auto"


def by_refitted_features(x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    def refit(images: Tensor, labels: Tensor, outer: int) -> Callable[[Tensor], Tensor]:
        hidden = trained(images, labels, seed + outer, epochs=30)[:-1]
        return lambda pictures: hidden((pictures - 0.5) * 4)

    generator = torch.Generator().manual_seed(seed)
    return cloak(x, y, eps=eps, refit=refit, outer_steps=10, inner_steps=15, generator=generator).images


CLOAKS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x, y, eps, seed: x,
    "random signs": random_signs,
    "error-minimising noise": error_minimising,
    "Bayes error, refitted": by_refitted_features,
    "Bayes error, pixels": by_pixels,
}


def cell(name: str, train: Data, test: Data, eps: float, seed: int) -> dict[str, float]:
    """Accuracy with half and all of the examples cloaked, and the estimates of the Bayes error."""
    x, y = train
    cloaked = CLOAKS[name](x, y, eps, seed)
    half = len(x) // 2
    mixed = torch.cat([cloaked[:half], x[half:]])
    result = {
        "half": accuracy(trained(mixed, y, seed), test),
        "all": accuracy(trained(cloaked, y, seed), test),
        "estimate": float(bayes_error(cloaked, y, bandwidth=width_of(x))),
        "estimate_mixed": float(bayes_error(mixed, y, bandwidth=width_of(x))),
    }
    if name == "none":
        result["clean half alone"] = accuracy(trained(x[half:], y[half:], seed), test)
    return result


def mean_of(cells: dict[str, dict[str, float]], where: str, name: str, key: str) -> float:
    found = [values[key] for place, values in cells.items() if place.startswith(f"{where}/{name}/")]
    return statistics.mean(found) if found else float("nan")


def table(cells: dict[str, dict[str, float]], where: str) -> str:
    """Accuracies as Markdown."""
    lines = [f"{where}; the clean half alone: {mean_of(cells, where, 'none', 'clean half alone'):.3f}", "",
             "| cloak | half cloaked | all | estimate, cloaked | mixed |", "|---|---|---|---|---|"]  # fmt: skip
    for name in CLOAKS:
        values = [mean_of(cells, where, name, key) for key in ("half", "all", "estimate", "estimate_mixed")]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def rows_of(cells: dict[str, dict[str, float]], where: str) -> list[Row]:
    ours, alone = (mean_of(cells, where, *given) for given in
                   (("Bayes error, pixels", "half"), ("none", "clean half alone")))  # fmt: skip
    other, clean = (mean_of(cells, where, name, "half") for name in ("error-minimising noise", "none"))
    refitted = mean_of(cells, where, "Bayes error, refitted", "half")
    asked = where == "Gaussians at 8/255"  # of crops, whatever there is
    return [
        Row(f"{where}, half by pixels: accuracy beside the clean half's alone", ours, alone, "below", ours < alone),
        Row(f"{where}, half by pixels: beside error-minimising noise", ours, other, "0.02 below", ours <= other - 0.02),
        Row(f"{where}, half by refitted features: beside error-minimising noise", refitted, other, "reported", True),
        Row(f"{where}, half by error-minimising noise: beside clean", other, clean,
            "within .01" if asked else "reported", abs(other - clean) <= 0.01 or not asked),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="of the Gaussians")
    parser.add_argument("--scene-seeds", type=int, default=2, help="of the crops")
    parser.add_argument("--minutes", type=float, help="start no further cell after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path, began = options.out / "unlearnable_examples.json", time.monotonic()
    cells = json.loads(path.read_text())["settings"]["cells"] if path.is_file() else {}
    plans = [("Gaussians at 8/255", gaussians, 8, options.seeds)]
    plans += [(f"crops at {levels}/255", crops, levels, options.scene_seeds) for levels in (8, 16, 4)]
    settings: dict[str, Any] = {"cells": cells, "examples": {"Gaussians": 800, "crops": 400}}
    for where, draw, levels, seeds in plans:
        for seed in range(seeds):
            missing = [name for name in CLOAKS if f"{where}/{name}/{seed}" not in cells]
            if not missing or (options.minutes and time.monotonic() - began > 60 * options.minutes):
                continue
            train, test = draw(seed)
            for name in missing:
                cells[f"{where}/{name}/{seed}"] = cell(name, train, test, levels / 255, seed)
                write_json(path, {"settings": settings, "rows": []})
    done = [
        where for where, *_ in plans if all(any(key.startswith(f"{where}/{name}/") for key in cells) for name in CLOAKS)
    ]
    for where in done:
        print(table(cells, where), end="\n\n")
    write_report(
        "unlearnable_examples", [row for where in done for row in rows_of(cells, where)], settings, options.out
    )


if __name__ == "__main__":
    main()
