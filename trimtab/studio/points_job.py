"""What the Points tab does: a cloud through a frozen autoencoder, under a loss, between two, and new ones.

The model is small, so it stays on the CPU, beside the model of pictures.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .checks import check_whole
from .code import Raw, call
from .model import SharedModel
from .points_source import NUM_POINTS, Shape, Upload

if TYPE_CHECKING:
    from torch import Tensor

    from .runs import Run

__all__ = [
    "LOSSES",
    "MOST_CLOUDS",
    "MOST_STEPS",
    "Clouds",
    "InterpolateJob",
    "ReconstructJob",
    "Reconstructed",
    "SampleJob",
]

LOSSES = {
    "none": "None, the encoder alone",
    "sliced_wasserstein": "Sliced Wasserstein (SW)",
    "distributional_sliced_wasserstein": "Distributional sliced Wasserstein (v-DSW)",
    "max_sliced_wasserstein": "Max sliced Wasserstein",
    "chamfer": "Chamfer",
    "earth_movers": "Earth mover's",
}
MOST_STEPS, MOST_CLOUDS = 300, 12
_MODEL = "point-clouds"
_LEARNING_RATE = 0.005
_PAUSE, _LONGER = 2.0, 1.5
"""Seconds between two pictures of a descent, and by what they grow: a browser without a graphics card draws slowly."""


def _load(name: str) -> Any:
    import diffusers

    from trimtab.assets import asset_path
    from trimtab.geometry import PointCloudReconstructionPipeline

    diffusers.utils.logging.disable_progress_bar()
    pipe = PointCloudReconstructionPipeline.from_pretrained(asset_path(name), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Reconstructed:
    """A reconstruction, so far.

    Attributes:
        step: of the descent; 0 is the encoder's.
        given: (N, 3) what was given, at unit radius.
        best: (NUM_POINTS, 3) the best so far, likewise.
        cloud: that in the frame of what was given.
        losses: the loss of each step; empty for the encoder alone.
        at_first: distances of the encoder's from what was given, by name.
        distances: of the best.
    """

    step: int
    given: Tensor
    best: Tensor
    cloud: Tensor
    losses: tuple[float, ...]
    at_first: dict[str, float]
    distances: dict[str, float]


@dataclass(frozen=True)
class Clouds:
    """Clouds (B, NUM_POINTS, 3) of unit radius."""

    clouds: Tensor


class _PointsJob:
    """What the jobs share: their model, which is not that of pictures."""

    holder: ClassVar[SharedModel] = SharedModel(_load)
    model: ClassVar[str] = _MODEL

    def seconds(self) -> float:
        """No GPU is used."""
        return 0.0


@dataclass(frozen=True)
class ReconstructJob(_PointsJob):
    """A reconstruction.

    Attributes:
        source: of the cloud.
        loss: one of ``LOSSES``, which the code descends from the encoder's on.
        steps: of the descent.
    """

    source: Shape | Upload
    loss: str = "sliced_wasserstein"
    steps: int = 60

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"The loss takes one of {', '.join(LOSSES)}.")
        check_whole("number of steps", self.steps, 1, MOST_STEPS)

    def run(self, pipe: Any, run: Run) -> None:
        """Reconstructs; the best so far is emitted now and then and at the end, also of a run that is stopped."""
        from trimtab.geometry import normalize_cloud, refine_latents

        cloud = self.source.load()
        unit, centre, radius = normalize_cloud(cloud)
        codes = pipe.encode(cloud)
        first = pipe.decode(codes.latents)[0]
        at_first = _distances(unit, first)
        made = Reconstructed(0, unit, first, pipe.decode(codes)[0], (), at_first, at_first)
        run.emit(made, "The encoder's reconstruction is there.")
        if self.loss == "none":
            return
        emitted, pause = time.monotonic(), _PAUSE
        try:
            for state in refine_latents(
                pipe.autoencoder, codes.latents, unit[None], loss=self.loss, num_steps=self.steps,
                learning_rate=_LEARNING_RATE,
            ):  # fmt: skip
                best, losses = state.best_clouds[0], (*made.losses, float(state.losses[0]))
                made = replace(made, step=state.step, best=best, cloud=best * radius + centre, losses=losses)
                note = f"Step {state.step} of {self.steps}, loss {losses[-1]:.5f}"
                if time.monotonic() - emitted > pause:
                    run.emit(replace(made, distances=_distances(unit, best)), note)
                    emitted, pause = time.monotonic(), _LONGER * pause
                run.note(note)
                run.check()
        finally:
            run.emit(replace(made, distances=_distances(unit, made.best)), "")

    def python_code(self) -> str:
        """The code that makes the same cloud."""
        names = ["PointCloudReconstructionPipeline", "save_point_cloud"]
        source = self.source.code()
        if isinstance(self.source, Upload):
            names.append("load_point_cloud")
            cloud = call("cloud = load_point_cloud", source, num_points=NUM_POINTS)
        else:
            cloud = f"cloud = {source}"
        if self.loss == "none":
            lines = ["out = pipe(cloud)", 'save_point_cloud(out.clouds[0], "reconstruction.ply")']
            lines.append("print(out.distances)")
            return _code(names, [cloud, *lines], self.source)
        names += ["normalize_cloud", "refine_latents"]
        descent = call(
            "*_, last = refine_latents", Raw("pipe.autoencoder"), Raw("pipe.encode(cloud).latents"),
            Raw("unit[None]"), loss=self.loss, num_steps=self.steps, learning_rate=_LEARNING_RATE,
        )  # fmt: skip
        lines = [
            cloud,
            "unit, centre, radius = normalize_cloud(cloud)",
            descent,
            'save_point_cloud(last.best_clouds[0] * radius + centre, "reconstruction.ply")',
            "print(last.best_losses)",
        ]
        return _code(names, lines, self.source)


@dataclass(frozen=True)
class InterpolateJob(_PointsJob):
    """Clouds from one to another.

    Attributes:
        first: source of the first.
        last: source of the last.
        count: how many, both ends' reconstructions included.
    """

    first: Shape | Upload
    last: Shape | Upload
    count: int = 6

    def __post_init__(self) -> None:
        check_whole("number of clouds", self.count, 2, MOST_CLOUDS)

    def run(self, pipe: Any, run: Run) -> None:
        """Makes them."""
        ends = [source.load() for source in (self.first, self.last)]
        run.emit(Clouds(pipe.interpolate(*ends, num_clouds=self.count).clouds))

    def python_code(self) -> str:
        """The code that makes the same clouds."""
        names = ["PointCloudReconstructionPipeline", "save_point_cloud"]
        made = call("clouds = pipe.interpolate", self.first.code(), self.last.code(), num_clouds=self.count)
        return _code(names, [f"{made}.clouds", *_saved("between")], self.first, self.last)


@dataclass(frozen=True)
class SampleJob(_PointsJob):
    """New clouds.

    Attributes:
        count: how many.
        seed: of their noise.
    """

    count: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("number of clouds", self.count, 1, MOST_CLOUDS)
        check_whole("seed", self.seed, 0, 2**62)

    def run(self, pipe: Any, run: Run) -> None:
        """Draws them."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        run.emit(Clouds(pipe.generate(self.count, generator=generator).clouds))

    def python_code(self) -> str:
        """The code that draws the same clouds."""
        names = ["PointCloudReconstructionPipeline", "save_point_cloud"]
        generator = Raw(f"torch.Generator().manual_seed({self.seed})")
        made = call("clouds = pipe.generate", self.count, generator=generator)
        return "import torch\n" + _code(names, [f"{made}.clouds", *_saved("new")])


def _saved(name: str) -> list[str]:
    return ["for index, cloud in enumerate(clouds, 1):", f'    save_point_cloud(cloud, f"{name}-{{index}}.ply")']


def _code(names: list[str], lines: list[str], *sources: Shape | Upload) -> str:
    drawn = any(isinstance(source, Shape) for source in sources)
    head = [
        "from trimtab.assets import asset_path",
        f"from trimtab.geometry import {', '.join(sorted(names))}",
        *(["from trimtab.recipes.point_clouds import draw_cloud"] if drawn else []),
        "",
        call("pipe = PointCloudReconstructionPipeline.from_pretrained", Raw(f'asset_path("{_MODEL}")')),
    ]
    return "\n".join([*head, *lines]) + "\n"


def _distances(unit: Tensor, result: Tensor) -> dict[str, float]:
    """At unit radius: the Chamfer distance of squares, the others as lengths."""
    import torch

    from trimtab.geometry import chamfer_distance, earth_movers_distance, sliced_wasserstein

    fixed = torch.Generator().manual_seed(0)
    sliced = sliced_wasserstein(unit, result, num_projections=200, directions="quasi", root=True, generator=fixed)
    return {
        "Chamfer": float(chamfer_distance(unit, result)),
        "Sliced Wasserstein": float(sliced),
        "Earth mover's": float(earth_movers_distance(unit, result)),
    }
