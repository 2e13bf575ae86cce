"""Pictures from uncalibrated measurements: PSNR beside ignoring the gains, and beside calibration without the prior.

The claim: with the bundled flow as prior, few snapshots through a sensor of unknown gains give a picture that neither
least squares with all gains 1 nor blind calibration alone does.

    python -m trimtab.benchmarks.optim.restoration [--pictures 4] [--picture docs/restoration.png]

Held-out scenes of 128 x 128 pixels with their captions; gains within 0.5 of 1 that are stripes, a wave and noise; noise
of deviation 0.02. Three sensors: a camera moved by up to 32 pixels in three shots that each lose two pixels of three
(fewer numbers than unknowns), the same in six shots that lose two of five, and 4,096 detectors behind random patterns
in six snapshots. Calibration without the prior is `calibrate_gains`, 300 steps, and least squares with the gains that
it finds, whichever is better. Rows already measured are kept in the results file's ``.partial`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from trimtab.assets import asset_path
from trimtab.benchmarks.optim.report import RESULTS, Row, write_report
from trimtab.commands.pictures import write_json
from trimtab.optim.solvers import calibrate_gains, project_gains
from trimtab.pipelines.restoration import RestorationPipeline
from trimtab.pipelines.sensors import PatternedSensor, Sensor, ShiftedSensor, least_squares
from trimtab.recipes.emoji_scenes.layout import sample_scene
from trimtab.recipes.emoji_scenes.scene import Scene

SIDE, RHO, NOISE = 128, 0.5, 0.02
SENSORS = ("3 shots", "6 shots", "patterns")
WAYS = ("ignored", "calibrated", "restored", "restored, gains known")
PICTURE = Path(__file__).parents[2] / "docs" / "restoration.png"


def make_sensor(kind: str, seed: int) -> Sensor:
    """A sensor of a kind, its shifts and masks drawn by the seed."""
    if kind == "patterns":
        return PatternedSensor(SIDE, SIDE, 4096, 6, seed=seed)
    shots, share = (3, 0.35) if kind == "3 shots" else (6, 0.6)
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(-32, 33, (shots, 2), generator=generator).tolist()
    return ShiftedSensor(shifts, (torch.rand(shots, SIDE, SIDE, generator=generator) < share).float())


def make_gains(sensor: Sensor, seed: int) -> Tensor:
    """Stripes, a wave and noise, within 0.5 of 1 and of mean 1."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = sensor.gains_shape
    if len(shape) == 1:
        pattern = torch.randn(shape, generator=generator)
    else:
        column = torch.arange(shape[1])
        pattern = torch.randn(shape[0], 1, generator=generator) + 0.5 * torch.randn(1, shape[1], generator=generator)
        pattern = pattern + 0.5 * torch.randn(shape, generator=generator) + torch.sin(column / 17.0)
    return project_gains(1 + RHO * (pattern / 2).tanh().flatten(), RHO).reshape(shape)


def psnr(image: Tensor, truth: Tensor) -> float:
    """In dB, of pictures (3, H, W) in [0, 1]."""
    return -10 * math.log10(float((image.clamp(0, 1) - truth).square().mean()))


def calibrated(y: Tensor, sensor: Sensor) -> list[Tensor]:
    """Blind calibration without a prior: its own signal, and least squares with its gains."""
    rows = len(y) * 3
    m, pixels = math.prod(sensor.gains_shape), math.prod(sensor.image_shape[1:])
    # Such that the mean of A_l^T A_l is m, as the method asks.
    scale = math.sqrt(pixels if len(sensor.gains_shape) == 1 else m / float(sensor.sees().mean()))

    def forward(x: Tensor) -> Tensor:
        return scale * sensor.forward(x).reshape(rows, m)

    def adjoint(r: Tensor) -> Tensor:
        return scale * sensor.adjoint(r.reshape(y.shape))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gains at the edge of what is allowed: it fails, which is what is measured
        found = calibrate_gains(scale * y.reshape(rows, m), forward, adjoint, max_iterations=300)
    return [found.signal, least_squares(y, sensor, found.gains.reshape(sensor.gains_shape))]


def restored(
    restore: RestorationPipeline, kind: str, scene: Scene, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """PSNR and picture of each way."""
    sensor, truth = make_sensor(kind, seed), torch.from_numpy(scene.render()).movedim(-1, 0)
    gains = make_gains(sensor, seed)
    y = sensor.measure(truth, gains, noise_level=NOISE, generator=torch.Generator().manual_seed(seed))
    pictures = {"scene": truth, "ignored": least_squares(y, sensor)}
    pictures["calibrated"] = max(calibrated(y, sensor), key=lambda image: psnr(image, truth))
    options = {"noise_level": NOISE, "output_type": "pt", "max_sequence_length": 16}
    pictures["restored"] = restore(y, sensor, scene.caption, **options).images[0]
    pictures["restored, gains known"] = restore(y, sensor, scene.caption, gains=gains, **options).images[0]
    pictures["first snapshot"] = y[0] if y.ndim == 4 else torch.zeros_like(truth)
    return {way: psnr(pictures[way], truth) for way in WAYS}, pictures


def draw(pictures: dict[str, dict[str, Tensor]], figures: dict[str, dict[str, float]], path: Path) -> None:
    """A row a sensor: the scene, a snapshot, and what each way makes of all snapshots."""
    from matplotlib.figure import Figure

    columns = ("scene", "first snapshot", "ignored", "calibrated", "restored")
    titles = ("the scene", "one of the snapshots", "gains ignored", "blind calibration alone", "with the flow")
    rows = [kind for kind in SENSORS if kind in pictures]
    figure = Figure(figsize=(2.1 * len(columns), 2.35 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, kind in enumerate(rows):
        for column, (name, title) in enumerate(zip(columns, titles, strict=True)):
            axis = axes[row, column]
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "first snapshot" and kind == "patterns":
                axis.text(0.5, 0.5, "4,096 numbers\nof random\npatterns", ha="center", va="center", fontsize=9)
                axis.set_aspect("equal")
            else:
                axis.imshow(pictures[kind][name].clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
            if not row:
                axis.set_title(title, fontsize=9)
            if not column:
                axis.set_ylabel(kind, fontsize=9)
            if name in figures[kind]:
                axis.set_xlabel(f"{figures[kind][name]:.1f} dB", fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pictures", type=int, default=4, help="scenes a sensor (default: 4)")
    add("--picture", type=Path, default=PICTURE, help="default: docs/restoration.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = StableDiffusion3Pipeline.from_pretrained(asset_path("emoji-scenes"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    restore = RestorationPipeline.from_pipe(pipe)
    restore.set_progress_bar_config(disable=True)
    source = np.random.default_rng(2025)
    scenes = [sample_scene(source, held_out=True) for _ in range(options.pictures)]
    partial = RESULTS / "restoration.partial"
    known: dict[str, dict[str, float]] = json.loads(partial.read_text()) if partial.exists() else {}
    shown: dict[str, dict[str, Tensor]] = {}
    example = min(1, len(scenes) - 1)  # the scene that is drawn
    for index, scene in enumerate(scenes):
        for kind in SENSORS:
            key = f"{kind}|{index}"
            if key not in known or index == example:
                known[key], pictures = restored(restore, kind, scene, index)
                print(f"{key} {scene.caption}: {known[key]}", flush=True)
                write_json(partial, known)
                if index == example:
                    shown[kind] = pictures
    rows = []
    for kind in SENSORS:
        mean = {way: sum(known[f"{kind}|{i}"][way] for i in range(len(scenes))) / len(scenes) for way in WAYS}
        ours, what = mean["restored"], f"PSNR in dB, {kind}: restored, "
        for way, more in (("ignored", 6), ("calibrated", 2)):
            rows.append(Row(what + f"gains {way}", ours, mean[way], f"{more} more", ours > mean[way] + more))
        rows.append(Row(what + "gains known", ours, mean["restored, gains known"], "beside it", True))
    settings = {"pictures": len(scenes), "rho": RHO, "noise": NOISE, "measured": known}
    write_report("restoration", rows, settings)
    if shown:
        draw(shown, {kind: known[f"{kind}|{example}"] for kind in shown}, options.picture)
        print(f"drawn to {options.picture}")
    partial.unlink()


if __name__ == "__main__":
    main()
