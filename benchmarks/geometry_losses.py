"""The paper's table in small (arXiv 2301.04791): autoencoders under each loss, same iterations, several seeds.

It goes on where it was: each pair of a loss and a seed is written as soon as it is done.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from trimtab.commands.pictures import write_json
from trimtab.geometry import PointCloudAutoencoder
from trimtab.recipes.point_clouds import LOSSES, TRAIN_CLASSES, ShapePool
from trimtab.recipes.point_clouds.model_card import codes_accuracy, reconstruction_errors
from trimtab.recipes.train_point_clouds import ReconstructionLoss, recalibrate, train_autoencoder
from trimtab.recipes.training_loop import TrainingSettings

__all__ = ["Size", "iteration_times", "losses"]

PAPER = {"num_points": 2048, "latent_dim": 256}  # the other sizes of the paper's autoencoder are the defaults


@dataclass(frozen=True)
class Size:
    """How much to train and to measure.

    Attributes:
        seeds: runs of each loss, from 0 on.
        steps: iterations of a run.
        batch_size: clouds an iteration.
        points: a cloud.
        slices: of the sliced losses.
        shapes_a_class: to train on.
        held_out: shapes a class to measure on.
    """

    seeds: int = 3
    steps: int = 400
    batch_size: int = 16
    points: int = 256
    slices: int = 100
    shapes_a_class: int = 40
    held_out: int = 6


QUICK = Size(seeds=1, steps=3, batch_size=4, points=32, slices=5, shapes_a_class=2, held_out=1)


def losses(output: Path, *, quick: bool = False, names: list[str] | None = None) -> list[dict[str, Any]]:
    """A row a loss: errors on shapes not trained on, accuracy of codes, time.

    Args:
        output: folder of ``geometry_losses.json``, in which every run is written as it ends.
        quick: one seed and few iterations on few points.
        names: of losses; None takes all.

    Returns:
        Means over seeds of CD, SW and EMD (times 100, see ``reconstruction_errors``), deviations of SW and EMD over
        the seeds, accuracy on classes that were not trained on, and milliseconds of one thread an iteration, of this
        autoencoder and of the paper's.
    """
    size = QUICK if quick else Size()
    path = output / "geometry_losses.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("size") != asdict(size):
        stored = {"size": asdict(size), "runs": {}}
    names = names or list(LOSSES)
    runs = stored["runs"]
    wanted = [(name, seed) for seed in range(size.seeds) for name in names if f"{name}/{seed}" not in runs]
    for name, seed in tqdm(wanted, desc="losses", disable=None):
        runs[f"{name}/{seed}"] = run(name, seed, size)
        write_json(path, stored)
    small = iteration_times(names, _config(size), size.batch_size, size.slices, repeats=1 if quick else 9)
    large = {} if quick else iteration_times(["sw", *names], PAPER, 4, size.slices, repeats=3)
    rows = []
    for name in names:
        found = [runs[f"{name}/{seed}"] for seed in range(size.seeds)]
        row: dict[str, Any] = {"loss": name}
        row |= {key: statistics.mean(run[key] for run in found) for key in ("CD", "SW", "EMD")}
        row |= {f"{key}, deviation": statistics.pstdev(run[key] for run in found) for key in ("SW", "EMD")}
        row["accuracy"] = statistics.mean(run["accuracy"] for run in found)
        row["ms an iteration"] = small[name]
        rows.append(row | ({"ms, paper's size": large[name]} if large else {}))
    return rows


def run(name: str, seed: int, size: Size) -> dict[str, float]:
    """One autoencoder from nothing under a loss, measured."""
    pool, held_out = _shapes(size)
    torch.manual_seed(seed)
    module = ReconstructionLoss(PointCloudAutoencoder(**_config(size)), name, num_projections=size.slices)
    settings = TrainingSettings(
        size.steps, size.batch_size, 2e-3, warmup_steps=20, weight_decay=1e-3, ema_decay=0.95, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        train_autoencoder(module, pool, settings, Path(folder))
    recalibrate(module.autoencoder, pool, batches=5)
    with torch.no_grad():
        errors = reconstruction_errors(held_out, module.autoencoder(held_out).sample.float())
    return errors | {"accuracy": codes_accuracy(module.autoencoder)}


def iteration_times(
    names: list[str], config: dict[str, Any], batch_size: int, slices: int, *, repeats: int
) -> dict[str, float]:
    """Milliseconds of a forward and a backward pass in this thread, medians of turns that take each loss once.

    The time of the thread, not of the clock, so that other work on the machine does not count; set OMP_NUM_THREADS=1
    for all of the work to be in it.
    """
    clouds = torch.randn(batch_size, config["num_points"], 3, generator=torch.Generator().manual_seed(0))
    clouds = clouds / clouds.norm(dim=-1).amax(-1)[:, None, None]
    modules = {
        name: ReconstructionLoss(PointCloudAutoencoder(**config), name, num_projections=slices) for name in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):  # the first one warms up
        for name, module in modules.items():
            start = time.thread_time()
            module(clouds, turn).backward()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _config(size: Size) -> dict[str, Any]:
    narrow = {"latent_dim": 64, "encoder_channels": (32, 64, 128), "decoder_channels": (256, 256)}
    return {"num_points": size.points, **narrow}


@cache
def _shapes(size: Size) -> tuple[ShapePool, torch.Tensor]:
    pool = ShapePool(TRAIN_CLASSES, size.shapes_a_class, 2 * size.points)
    return pool, ShapePool(TRAIN_CLASSES, size.held_out, size.points, test=True).clouds
