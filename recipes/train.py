"""Trains everything bundled: ``python -m trimtab.recipes.train --preset cpu``. Run again after an interruption."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from trimtab.assets import asset_path

from .assemble import assemble_pipeline, save_clip, save_pipeline
from .curvature import add_curvature_argument, with_curvature
from .optimizers import OPTIMIZERS
from .train_autoencoder import ReconstructionLoss, build_autoencoder, measure_autoencoder, train_autoencoder
from .train_clip import ContrastiveLoss, build_clip, measure_clip, train_clip
from .train_transformer import (
    EncodedScenes,
    FlowMatchingLoss,
    build_transformer,
    category_weights,
    encode_scenes,
    train_transformer,
)
from .training_loop import TrainingSettings, averaged_weights, write_finished

STEPS = ("autoencoder", "transformer", "finish", "clip", "assemble")


@dataclass(frozen=True)
class Preset:
    """How each step is trained on one kind of machine.

    ``finish`` goes on from the transformer's averaged weights, with more scenes of one object, which are drawn largest
    and so have the most to learn, and of several. ``optimizer`` is the transformer's,
    by the name that ``build_optimizers`` takes; None is Muon and AdamW.
    """

    autoencoder: TrainingSettings
    crop_steps: int
    num_scenes: int
    transformer: TrainingSettings
    finish: TrainingSettings
    num_layers: int
    num_attention_heads: int
    clip: TrainingSettings
    timestep_shift: float
    optimizer: str | None = None


PRESETS = {
    "cpu": Preset(
        autoencoder=TrainingSettings(3200, 16, 1.2e-3, decay_start=0.5, ema_decay=0.995),
        crop_steps=2470,
        num_scenes=48_000,
        transformer=TrainingSettings(4200, 64, 1.5e-3, ema_decay=0.998, compile=True),
        finish=TrainingSettings(4300, 64, 1e-3, warmup_steps=50, decay_start=0.2, ema_decay=0.998, compile=True),
        num_layers=6,
        num_attention_heads=4,
        clip=TrainingSettings(1800, 128, 1e-3, decay_start=0.3, ema_decay=0.99, compile=True),
        timestep_shift=1.0,
    ),
    "gpu": Preset(
        autoencoder=TrainingSettings(12_000, 64, 1.2e-3, decay_start=0.4, ema_decay=0.998),
        crop_steps=6000,
        num_scenes=200_000,
        transformer=TrainingSettings(9000, 512, 1.5e-3, ema_decay=0.999, compile=True),
        finish=TrainingSettings(3000, 512, 1e-3, warmup_steps=50, decay_start=0.2, ema_decay=0.999, compile=True),
        num_layers=6,
        num_attention_heads=4,
        clip=TrainingSettings(3000, 512, 1e-3, ema_decay=0.995),
        timestep_shift=1.0,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the steps that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=tuple(PRESETS), default=default, help=f"default here: {default}")
    parser.add_argument("--folder", type=Path, default=Path("out/training"), help="where the checkpoints lie")
    parser.add_argument(
        "--output", type=Path, default=asset_path("emoji-sprites").parent, help="where the models are written"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which steps to run")
    parser.add_argument("--start-from", type=Path, help="model folder to go on from at the finishing step")
    parser.add_argument("--max-seconds", type=float, help="stop each step with a checkpoint after this time")
    parser.add_argument("--optimizer", help=f"the transformer's: {', '.join(OPTIMIZERS)} or any of torch.optim")
    parser.add_argument("--learning-rate", type=float, help="the transformer's, in the place of the preset's")
    add_curvature_argument(parser, of="each part's loss")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    preset, folder = _chosen(PRESETS[options.preset], options.optimizer, options.learning_rate), options.folder
    if options.curvature:
        preset = with_curvature(preset)
    if options.start_from:
        start_from(options.start_from, preset, folder)
    for step in options.steps:
        if step == "assemble":
            assemble(preset, folder, options.output)
        elif not _TRAINERS[step](preset, folder, options.max_seconds):
            print(f"{step}: stopped after {options.max_seconds:g} s; run the same command to go on")
            return


def _chosen(preset: Preset, optimizer: str | None, learning_rate: float | None) -> Preset:
    """The preset with another optimizer and rate of the transformer."""
    if learning_rate is not None:
        parts = {
            name: replace(getattr(preset, name), learning_rate=learning_rate) for name in ("transformer", "finish")
        }
        preset = replace(preset, **parts)
    return replace(preset, optimizer=optimizer)


def start_from(model: Path, preset: Preset, folder: Path) -> None:
    """Makes the parts of the repository ``model`` the finished checkpoints of the steps before ``finish``.

    Raises:
        ValueError: ``folder`` has checkpoints of these steps already.
    """
    parts = {"autoencoder": ReconstructionLoss(build_autoencoder()), "transformer": _denoiser(preset)}
    if taken := [name for name in parts if (folder / name).exists()]:
        raise ValueError(f"--start-from needs a --folder without checkpoints, {folder} has those of {', '.join(taken)}")
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32)
    parts["autoencoder"].autoencoder.load_state_dict(pipeline.vae.state_dict())
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(parts["transformer"], name).load_state_dict(getattr(pipeline, name).state_dict())
    for name, module in parts.items():
        write_finished(module, getattr(preset, name), folder / name)


def _train_autoencoder(preset: Preset, folder: Path, max_seconds: float | None) -> bool:
    return train_autoencoder(
        build_autoencoder(),
        preset.autoencoder,
        folder / "autoencoder",
        crop_steps=preset.crop_steps,
        max_seconds=max_seconds,
    )


def _train_transformer(preset: Preset, folder: Path, max_seconds: float | None) -> bool:
    scenes = _scenes(preset, folder)
    module = _denoiser(preset)
    return train_transformer(
        module,
        scenes,
        preset.transformer,
        folder / "transformer",
        max_seconds=max_seconds,
        optimizer=preset.optimizer,
    )


def _finish_transformer(preset: Preset, folder: Path, max_seconds: float | None) -> bool:
    scenes = _scenes(preset, folder)
    module = _denoiser(preset)
    averaged_weights(module, folder / "transformer")
    weights = category_weights(scenes, one=2.0, count=1.3, relation=1.0)
    return train_transformer(
        module,
        scenes,
        preset.finish,
        folder / "finish",
        max_seconds=max_seconds,
        weights=weights,
        optimizer=preset.optimizer,
    )


def _train_clip(preset: Preset, folder: Path, max_seconds: float | None) -> bool:
    return train_clip(build_clip(), preset.clip, folder / "clip", max_seconds=max_seconds)


_TRAINERS = {
    "autoencoder": _train_autoencoder,
    "transformer": _train_transformer,
    "finish": _finish_transformer,
    "clip": _train_clip,
}


def assemble(preset: Preset, folder: Path, output: Path) -> None:
    """Writes the averaged weights of every step's checkpoint to ``output`` and prints what they measure."""
    autoencoder = _trained_autoencoder(folder)
    scenes = _scenes(preset, folder)
    denoiser = _denoiser(preset)
    averaged_weights(denoiser, folder / "finish")
    print(f"autoencoder: {measure_autoencoder(autoencoder):.2f} dB on held-out scenes")
    pipeline = assemble_pipeline(
        autoencoder,
        denoiser.eval(),
        latent_mean=scenes.mean,
        latent_deviation=scenes.deviation,
        timestep_shift=preset.timestep_shift,
    )
    save_pipeline(pipeline, output / "emoji-scenes")
    if (folder / "clip").exists():
        module = ContrastiveLoss(build_clip())
        averaged_weights(module, folder / "clip")
        print(f"emoji-clip: {measure_clip(module.clip.eval()):.1%} of captions made wrong in one attribute told apart")
        save_clip(module.clip, output / "emoji-clip")


def _scenes(preset: Preset, folder: Path) -> EncodedScenes:
    autoencoder = _trained_autoencoder(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    return encode_scenes(autoencoder, preset.num_scenes, folder / "scenes.safetensors")


def _trained_autoencoder(folder: Path) -> torch.nn.Module:
    module = ReconstructionLoss(build_autoencoder())
    averaged_weights(module, folder / "autoencoder")
    return module.autoencoder.eval()


def _denoiser(preset: Preset) -> FlowMatchingLoss:
    return FlowMatchingLoss(
        build_transformer(num_layers=preset.num_layers, num_attention_heads=preset.num_attention_heads)
    )


if __name__ == "__main__":
    main()
