"""What the bundled point-cloud model measures, and its card."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.geometry import (
    PointCloudReconstructionPipeline,
    chamfer_distance,
    earth_movers_distance,
    sliced_wasserstein,
)

from .dataset import ShapePool
from .shapes import TRAIN_CLASSES, TRANSFER_CLASSES

__all__ = ["codes_accuracy", "measure_model", "nearest_neighbour_accuracy", "reconstruction_errors", "write_card"]

_CARD = """\
---
license: apache-2.0
library_name: diffusers
tags: [point-cloud, autoencoder, flow-matching, sliced-wasserstein, tiny]
---

# point-clouds

A small autoencoder of point clouds ({autoencoder:.1f} million parameters: any number of points to a code of
{latent_dim} numbers, and back to {num_points} points) and a flow over its codes ({flow:.1f} million parameters)
that draws new ones. It was trained from nothing on shapes made by procedure, in {num_classes} classes of furniture,
vehicles, vessels, solids and emoji silhouettes, under the amortized distributional sliced Wasserstein distance with
efficient attention of "Self-Attention Amortized Distributional Projection Optimization for Sliced Wasserstein
Point-Cloud Reconstruction" (arXiv 2301.04791). It ships with [trimtab](https://github.com/trimtab/trimtab).

```python
from trimtab.assets import asset_path
from trimtab.geometry import PointCloudReconstructionPipeline

pipe = PointCloudReconstructionPipeline.from_pretrained(asset_path("point-clouds"))
output = pipe("chair.ply")  # a file, a mesh or an array; .clouds, .latents, .distances
clouds = pipe.generate(4).clouds
```

## Figures

Distances between clouds of unit radius and {num_points} points, means over shapes that training never saw, times 100.
CD is the sum of the mean squared distances to the nearest point, SW the 2-sliced Wasserstein distance, EMD the
mean distance of the best matching. The floor is another sample of the same surface.

| shapes | CD | SW | EMD | CD, floor | SW, floor | EMD, floor |
|---|---|---|---|---|---|---|
{rows}

A linear classifier on the codes tells the {num_transfer} held-out classes apart in {accuracy:.0%} of cases. Drawn
clouds and held-out ones are told apart by their nearest neighbour (SW) in {neighbours:.0%} of cases; 50% is the best.

## How it was made

`python -m trimtab.recipes.train_point_clouds` (seed 0). {training}

## Limits

It knows its classes and little else: a scanned object comes back as the nearest thing that these shapes can make.
Codes of {latent_dim} numbers keep the large parts and round off the small ones. Shapes are expected upright, y up.

The weights are under the Apache License 2.0. Some classes are silhouettes of Noto Emoji by Google, under the same.
"""


@torch.no_grad()
def reconstruction_errors(clouds: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Means over pairs of clouds (M, N, 3) of CD, SW_2 and EMD, each times 100."""
    fixed = torch.Generator().manual_seed(0)
    options = {"num_projections": 200, "directions": "quasi", "generator": fixed}
    return {
        "CD": 100 * chamfer_distance(clouds, reconstructed).mean().item(),
        "SW": 100 * sliced_wasserstein(clouds, reconstructed, root=True, **options).mean().item(),
        "EMD": 100 * earth_movers_distance(clouds, reconstructed).mean().item(),
    }


def codes_accuracy(autoencoder: Any, *, train: int = 24, test: int = 12, seed: int = 3) -> float:
    """Share of the held-out classes' shapes that a linear classifier on frozen codes tells apart.

    Args:
        autoencoder: a :class:`~trimtab.geometry.PointCloudAutoencoder`.
        train: shapes a class that the classifier learns from.
        test: shapes a class that it is tried on.
        seed: of the shapes.
    """
    points = autoencoder.config.num_points
    codes, labels = [], []
    for is_test, count in ((False, train), (True, test)):
        pool = _transfer_shapes(count, points, is_test, seed)
        with torch.no_grad():
            parts = pool.clouds.split(64)
            codes.append(torch.cat([autoencoder.eval().encode(part).latents for part in parts]).double())
        labels.append(pool.labels)
    mean, deviation = codes[0].mean(0), codes[0].std(0) + 1e-6
    inputs, held_out = ((c - mean) / deviation for c in codes)
    layer = torch.nn.Linear(inputs.shape[1], len(TRANSFER_CLASSES), dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(inputs), labels[0]) + 1e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return (layer(held_out).argmax(1) == labels[1]).double().mean().item()


@cache
def _transfer_shapes(count: int, points: int, is_test: bool, seed: int) -> ShapePool:
    return ShapePool(TRANSFER_CLASSES, count, points, test=is_test, seed=seed)


@torch.no_grad()
def nearest_neighbour_accuracy(drawn: Tensor, real: Tensor) -> float:
    """How often the nearest other cloud by SW is of a cloud's own set (1-NNA): 1/2 for sets of one distribution."""
    both = torch.cat([drawn, real])
    table = sliced_wasserstein(both, both, num_projections=32, directions="quasi", pairwise=True)
    nearest = table.fill_diagonal_(torch.inf).argmin(1)
    is_drawn = torch.arange(len(both)) < len(drawn)
    return (is_drawn[nearest] == is_drawn).double().mean().item()


@torch.no_grad()
def measure_model(pipe: PointCloudReconstructionPipeline, *, shapes_a_class: int = 4, seed: int = 0) -> dict[str, Any]:
    """Errors on held-out shapes of known and of new classes, with their floors, and what codes and draws are worth.

    Args:
        pipe: with a flow.
        shapes_a_class: tried for reconstruction.
        seed: of all that is drawn.
    """
    points = pipe.autoencoder.config.num_points
    errors = {}
    for label, classes in (("known classes", TRAIN_CLASSES), ("new classes", TRANSFER_CLASSES)):
        dense = ShapePool(classes, shapes_a_class, 2 * points, test=True, seed=seed).clouds
        clouds, others = dense[:, :points], dense[:, points:]
        found = reconstruction_errors(clouds, pipe.autoencoder.eval()(clouds).sample.float())
        floor = reconstruction_errors(clouds, others)
        errors[label] = {**found, **{f"{name}, floor": value for name, value in floor.items()}}
    real = ShapePool(TRAIN_CLASSES, 6, points, test=True, seed=seed + 1).clouds
    drawn = pipe.generate(len(real), generator=torch.Generator().manual_seed(seed)).clouds
    return {
        "errors": errors,
        "accuracy": codes_accuracy(pipe.autoencoder),
        "neighbours": nearest_neighbour_accuracy(drawn, real),
        "parameters": {name: getattr(pipe, name).num_parameters() for name in ("autoencoder", "flow")},
    }


def write_card(folder: Path, figures: dict[str, Any], pipe: PointCloudReconstructionPipeline, training: str) -> None:
    """Writes ``figures.json`` and ``README.md`` into the model's folder.

    Args:
        folder: the model's.
        figures: of :func:`measure_model`.
        pipe: the model.
        training: a sentence on how long it took and on what.
    """
    columns = ("CD", "SW", "EMD", "CD, floor", "SW, floor", "EMD, floor")
    rows = [
        f"| {label} | " + " | ".join(f"{values[name]:.2f}" for name in columns) + " |"
        for label, values in figures["errors"].items()
    ]
    card = _CARD.format(
        autoencoder=figures["parameters"]["autoencoder"] / 1e6,
        flow=figures["parameters"]["flow"] / 1e6,
        latent_dim=pipe.autoencoder.config.latent_dim,
        num_points=pipe.autoencoder.config.num_points,
        num_classes=len(TRAIN_CLASSES),
        num_transfer=len(TRANSFER_CLASSES),
        rows="\n".join(rows),
        accuracy=figures["accuracy"],
        neighbours=figures["neighbours"],
        training=training,
    )
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
