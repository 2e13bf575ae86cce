"""The paper's table in small (arXiv 2301.04791): autoencoders under each loss, same iterations, several seeds."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.geometry import PointCloudAutoencoder
from trimtab.recipes.point_clouds import LOSSES, TRAIN_CLASSES, ShapePool
from trimtab.recipes.point_clouds.model_card import codes_accuracy, reconstruction_errors
from trimtab.recipes.train_point_clouds import ReconstructionLoss, recalibrate, train_autoencoder
from trimtab.recipes.training_loop import TrainingSettings

__all__ = ["losses"]


def losses(*, quick: bool = False, names: list[str] | None = None) -> list[dict[str, Any]]:
    """A row a loss: errors on shapes that were not trained on, seconds an iteration, accuracy of codes.

    Args:
        quick: one seed and few iterations on few points.
        names: of losses; None takes all.
    """
    seeds, steps, points = (1, 3, 32) if quick else (3, 250, 256)
    pool = ShapePool(TRAIN_CLASSES, 2 if quick else 40, 2 * points)
    held_out = ShapePool(TRAIN_CLASSES, 1 if quick else 3, points, test=True).clouds
    config = {"num_points": points, "latent_dim": 64, "encoder_channels": (32, 64, 128), "decoder_channels": (256, 256)}
    rows = []
    for name in names or LOSSES:
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            module = ReconstructionLoss(PointCloudAutoencoder(**config), name)
            settings = TrainingSettings(steps, 16, 2e-3, warmup_steps=20, weight_decay=1e-3, ema_decay=0.9, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                train_autoencoder(module, pool, settings, Path(folder))
                seconds = (time.perf_counter() - start) / steps
            recalibrate(module.autoencoder, pool, batches=5)
            with torch.no_grad():
                errors = reconstruction_errors(held_out, module.autoencoder(held_out).sample.float())
            counts = {"train": 2, "test": 1} if quick else {}
            accuracy = codes_accuracy(module.autoencoder, **counts)
            found.append({**errors, "accuracy": accuracy, "ms an iteration": 1e3 * seconds})
        means = {key: statistics.mean(row[key] for row in found) for key in found[0]}
        spread = statistics.pstdev(row["SW"] for row in found)
        rows.append({"loss": name, **means, "SW's deviation over seeds": spread})
        print(rows[-1], flush=True)
    return rows
