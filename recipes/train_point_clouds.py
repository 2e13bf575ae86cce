"""The bundled point-cloud model from nothing: ``python -m trimtab.recipes.train_point_clouds``.

Three steps, each of which resumes: the autoencoder under a loss of the paper's table (arXiv 2301.04791), a flow over
its codes, and their assembly into a Diffusers repository.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from trimtab.assets import asset_path
from trimtab.geometry import LatentFlow, PointCloudAutoencoder, PointCloudReconstructionPipeline

from .curvature import add_curvature_argument, with_curvature
from .point_clouds import LOSSES, TRAIN_CLASSES, ShapePool, build_loss
from .point_clouds.model_card import measure_model, write_card
from .training_loop import TrainingSettings, adamw, averaged_weights, train

__all__ = [
    "PRESETS",
    "FlowLoss",
    "Preset",
    "ReconstructionLoss",
    "assemble",
    "recalibrate",
    "train_autoencoder",
    "train_flow",
]

STEPS = ("autoencoder", "flow", "assemble", "measure")


@dataclass(frozen=True)
class Preset:
    """Sizes that suit a machine.

    Attributes:
        autoencoder: configuration of the autoencoder.
        training: of the autoencoder.
        flow: configuration of the flow.
        flow_training: of the flow.
        shapes_a_class: made for training.
    """

    autoencoder: dict
    training: TrainingSettings
    flow: dict
    flow_training: TrainingSettings
    shapes_a_class: int


PRESETS = {
    "cpu": Preset(
        autoencoder={
            "num_points": 1024,
            "latent_dim": 128,
            "encoder_channels": (32, 64, 256),
            "decoder_channels": (512, 768),
        },
        training=TrainingSettings(3000, 32, 2e-3, decay_start=0.3, weight_decay=1e-3, ema_decay=0.995),
        flow={"hidden_dim": 224, "num_layers": 3},
        flow_training=TrainingSettings(4000, 256, 1e-3, decay_start=0.4, ema_decay=0.998),
        shapes_a_class=200,
    ),
    "gpu": Preset(
        autoencoder={},
        training=TrainingSettings(60_000, 128, 1e-3, decay_start=0.4, weight_decay=1e-3, ema_decay=0.999),
        flow={},
        flow_training=TrainingSettings(40_000, 1024, 1e-3, decay_start=0.4, ema_decay=0.999),
        shapes_a_class=1000,
    ),
}


class ReconstructionLoss(nn.Module):
    """An autoencoder with the distance between clouds and their reconstructions.

    Args:
        autoencoder: to train.
        loss: name of the distance, one of :data:`~trimtab.recipes.point_clouds.LOSSES`.
        kappa: of the v-DSW distances.
        num_projections: of the sliced ones.
    """

    def __init__(
        self, autoencoder: PointCloudAutoencoder, loss: str, *, kappa: float = 1.0, num_projections: int = 100
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        points = autoencoder.config.num_points
        self.distance = build_loss(loss, points, kappa=kappa, num_projections=num_projections)

    def forward(self, clouds: Tensor, seed: int) -> Tensor:
        """The mean distance of a batch (B, N, d); one backward pass serves the adversary too, where there is one."""
        generator = torch.Generator().manual_seed(seed)
        reconstructed = self.autoencoder(clouds).sample.float()
        cost = getattr(self.distance, "joint_loss", self.distance.loss)
        with torch.autocast(clouds.device.type, enabled=False):
            return cost(clouds, reconstructed, generator)

    def optimizers(self, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
        """AdamW for the autoencoder; for the slicer the paper's Adam, of rate 1e-3 and betas (0, 0.9)."""
        found: list[torch.optim.Optimizer] = [adamw(self.autoencoder.named_parameters(), settings)]
        if slicer := list(self.distance.parameters()):
            group = {"params": slicer, "rate_factor": 1e-3 / settings.learning_rate}
            found.append(torch.optim.Adam([group], lr=1e-3, betas=(0.0, 0.9)))
        return found


class FlowLoss(nn.Module):
    """Mean squared error of the velocity between codes and noise.

    Args:
        flow: to train.
    """

    def __init__(self, flow: LatentFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Takes standardized codes (B, D), noise (B, D) and sigma (B,) in [0, 1]; gives a scalar."""
        mixed = torch.lerp(latents, noise, sigma[:, None])
        velocity = self.flow(mixed, 1000.0 * sigma).sample.float()
        return (velocity - (noise - latents)).square().mean()


def train_autoencoder(
    module: ReconstructionLoss,
    pool: ShapePool,
    settings: TrainingSettings,
    folder: Path,
    *,
    max_seconds: float | None = None,
) -> bool:
    """Trains on draws from a pool; gives whether all steps are done."""
    num_points = module.autoencoder.config.num_points

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seed = settings.seed * 1_000_003 + draw
        clouds = pool.draw(settings.batch_size, num_points, torch.Generator().manual_seed(seed)).to(device)
        return prepared(clouds, seed), {}

    optimizers = module.optimizers(settings)
    return train(module, loss_of_step, settings, folder, max_seconds=max_seconds, optimizers=optimizers)


def train_flow(
    module: FlowLoss, latents: Tensor, settings: TrainingSettings, folder: Path, *, max_seconds: float | None = None
) -> bool:
    """Trains on standardized codes (M, D); gives whether all steps are done."""

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + draw)
        chosen = latents[torch.randint(len(latents), (settings.batch_size,), generator=generator)]
        noise = torch.randn(chosen.shape, generator=generator)
        sigma = torch.randn(len(chosen), generator=generator).sigmoid()  # logit-normal, more in the middle
        return prepared(chosen.to(device), noise.to(device), sigma.to(device)), {}

    return train(module, loss_of_step, settings, folder, max_seconds=max_seconds)


@torch.no_grad()
def recalibrate(autoencoder: PointCloudAutoencoder, pool: ShapePool, *, batches: int = 40, seed: int = 1) -> None:
    """Measures the batch normalizations' statistics anew: those of the run belong to weights before averaging."""
    norms = [module for module in autoencoder.modules() if isinstance(module, nn.BatchNorm1d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    autoencoder.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        autoencoder(pool.draw(64, autoencoder.config.num_points, generator).to(autoencoder.device))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    autoencoder.eval()


@torch.no_grad()
def encode_pool(autoencoder: PointCloudAutoencoder, pool: ShapePool, *, draws: int = 6, seed: int = 2) -> Tensor:
    """Codes of ``draws`` times as many random clouds as the pool has shapes, (M, D)."""
    generator = torch.Generator().manual_seed(seed)
    points, device = autoencoder.config.num_points, autoencoder.device
    batches = (pool.draw(128, points, generator) for _ in range(max(1, draws * len(pool.clouds) // 128)))
    return torch.cat([autoencoder.encode(batch.to(device)).latents.cpu() for batch in batches])


def assemble(
    autoencoder: PointCloudAutoencoder, flow: LatentFlow, folder: Path, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a Diffusers repository to ``folder``, whole or not at all; its other files are kept."""
    pipeline = PointCloudReconstructionPipeline(
        autoencoder.to(dtype), flow.to(dtype), FlowMatchEulerDiscreteScheduler()
    )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    folder.mkdir(parents=True, exist_ok=True)
    for item in temporary.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        item.replace(target)
    temporary.rmdir()


def main(arguments: list[str] | None = None) -> None:
    """Runs the steps that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default=default, help=f"default here: {default}")
    add("--loss", choices=tuple(LOSSES), default="ea-v-dsw", help="default: ea-v-dsw")
    add("--kappa", type=float, default=1.0, help="of the v-DSW losses (default: 1)")
    add("--num-projections", type=int, default=32, help="slices of a loss (default: 32)")
    add("--folder", type=Path, default=Path("out/point_clouds"), help="where the checkpoints lie")
    add("--output", type=Path, help="the model's folder (default: assets/point-clouds)")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which steps to run")
    add("--max-seconds", type=float, help="stop each step with a checkpoint after this time")
    # Autoencoder and slicer climb and descend at once: no one loss has their Hessian.
    add_curvature_argument(parser, of="the flow's loss")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    preset, folder = PRESETS[options.preset], options.folder
    if options.curvature:
        preset = with_curvature(preset, "flow_training")
    pool = ShapePool(TRAIN_CLASSES, preset.shapes_a_class)
    module = ReconstructionLoss(
        PointCloudAutoencoder(**preset.autoencoder),
        options.loss,
        kappa=options.kappa,
        num_projections=options.num_projections,
    )
    if "autoencoder" in options.steps and not train_autoencoder(
        module, pool, preset.training, folder / "autoencoder", max_seconds=options.max_seconds
    ):
        print(f"autoencoder: stopped after {options.max_seconds:g} s; run the same command to go on")
        return
    averaged_weights(module, folder / "autoencoder")
    autoencoder = module.autoencoder
    recalibrate(autoencoder, pool)
    latents = encode_pool(autoencoder, pool)
    mean, deviation = latents.mean().item(), latents.std().item()
    flow = LatentFlow(latents.shape[1], latent_mean=mean, latent_deviation=deviation, **preset.flow)
    flow_module = FlowLoss(flow)
    if "flow" in options.steps and not train_flow(
        flow_module, flow.standardize(latents), preset.flow_training, folder / "flow", max_seconds=options.max_seconds
    ):
        print(f"flow: stopped after {options.max_seconds:g} s; run the same command to go on")
        return
    output = options.output or asset_path("emoji-sprites").parent / "point-clouds"
    if "assemble" in options.steps:
        averaged_weights(flow_module, folder / "flow")
        assemble(autoencoder.cpu().eval(), flow.cpu().eval(), output)
        print(f"written to {output}")
    if "measure" in options.steps:
        pipe = PointCloudReconstructionPipeline.from_pretrained(output)
        figures = measure_model(pipe)
        training = preset.training
        write_card(
            output,
            figures,
            pipe,
            f"The autoencoder took {training.num_steps:,} steps of {training.batch_size} clouds under {options.loss} "
            f"with {options.num_projections} slices, the flow {preset.flow_training.num_steps:,} steps.",
        )
        print(figures)


if __name__ == "__main__":
    main()
