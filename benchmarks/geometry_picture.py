"""A picture of held-out shapes and what autoencoders trained under several losses make of them.

python -m trimtab.recipes.train_point_clouds --loss sw --folder out/sw --steps autoencoder    # one for each loss
python benchmarks/geometry_picture.py sw=out/sw ea-v-dsw=out/ea cd=out/cd --output pictures.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trimtab.commands.pictures import save_png
from trimtab.geometry import PointCloudAutoencoder, chamfer_distance, render_point_cloud, sliced_wasserstein
from trimtab.recipes.point_clouds import TRAIN_CLASSES, ShapePool, draw_cloud
from trimtab.recipes.train_point_clouds import PRESETS, ReconstructionLoss, recalibrate
from trimtab.recipes.training_loop import averaged_weights

__all__ = ["main", "picture", "trained"]

SHAPES = ("chair", "table", "lamp", "mug", "plane", "star", "bowl", "rocket")
LABELS = {"sw": "SW", "ea-v-dsw": "EA v-DSW", "cd": "Chamfer"}


def trained(name: str, folder: Path, preset: str) -> PointCloudAutoencoder:
    """The autoencoder of a run of the recipe under the loss ``name``."""
    sizes = PRESETS[preset]
    module = ReconstructionLoss(PointCloudAutoencoder(**sizes.autoencoder), name)
    averaged_weights(module, folder / "autoencoder")
    recalibrate(module.autoencoder, ShapePool(TRAIN_CLASSES, min(40, sizes.shapes_a_class)))
    return module.autoencoder


@torch.no_grad()
def picture(
    models: dict[str, PointCloudAutoencoder], shapes: Sequence[str] = SHAPES, *, size: int = 150
) -> Image.Image:
    """A row of inputs and a row a model, each with the means of its errors (times 100) over the shapes shown.

    Args:
        models: by the name of their loss.
        shapes: classes; the picture shows the first test shape of each.
        size: of a cloud in pixels.
    """
    points = next(iter(models.values())).config.num_points
    clouds = torch.stack([draw_cloud(shape, 1, points, test=True) for shape in shapes])
    margin = 130
    sheet = Image.new("RGB", (margin + size * len(shapes), size * (1 + len(models))), "white")
    _row(sheet, 0, margin, "input", clouds, size)
    for index, (name, model) in enumerate(models.items(), 1):
        made = model(clouds).sample.float()
        slices = {"num_projections": 200, "directions": "quasi", "generator": torch.Generator().manual_seed(0)}
        sliced = 100 * sliced_wasserstein(clouds, made, root=True, **slices).mean()
        chamfer = 100 * chamfer_distance(clouds, made).mean()
        label = f"{LABELS.get(name, name)}\nSW {sliced:.2f}\nCD {chamfer:.2f}"
        _row(sheet, index, margin, label, made, size)
    return sheet


def _row(sheet: Image.Image, index: int, margin: int, label: str, clouds: Tensor, size: int) -> None:
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(sheet).multiline_text((8, index * size + size // 2 - 24), label, fill="black", font=font)
    for column, cloud in enumerate(clouds):
        sheet.paste(render_point_cloud(cloud, size=size), (margin + column * size, index * size))


def main(arguments: list[str] | None = None) -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="LOSS=FOLDER", help="runs of recipes/train_point_clouds.py")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="of the runs (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("reconstructions.png"))
    options = parser.parse_args(arguments)
    runs = dict(run.split("=", 1) for run in options.runs)
    models = {name: trained(name, Path(folder), options.preset) for name, folder in runs.items()}
    save_png(picture(models), options.output, {"losses": list(runs), "preset": options.preset})


if __name__ == "__main__":
    main()
