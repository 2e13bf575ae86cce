"""Step 4 of the bundled model: the trained parts as a standard Diffusers repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModelMixin, StableDiffusion3Pipeline
from transformers import CLIPModel

from .text import build_tokenizer
from .train_clip import build_image_processor
from .train_transformer import FlowMatchingLoss


def assemble_pipeline(
    autoencoder: AutoencoderKL,
    denoiser: FlowMatchingLoss,
    *,
    latent_mean: float,
    latent_deviation: float,
    timestep_shift: float,
) -> StableDiffusion3Pipeline:
    """A stock pipeline of trained parts.

    Args:
        autoencoder: step 1.
        denoiser: step 3, the transformer with its text encoders.
        latent_mean: of all latents that the transformer was trained on; goes into the autoencoder's configuration.
        latent_deviation: likewise.
        timestep_shift: of the scheduler: above 1 spends more steps where there is more noise.
    """
    autoencoder.register_to_config(scaling_factor=1.0 / latent_deviation, shift_factor=latent_mean)
    return StableDiffusion3Pipeline(
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=timestep_shift),
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=build_tokenizer(),
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=denoiser.text_encoder_3,
        tokenizer_3=build_tokenizer(start_token=False),
    )


def save_pipeline(pipeline: StableDiffusion3Pipeline, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes ``pipeline`` as safetensors of ``dtype`` to ``folder``, whole or not at all; keeps its other files."""
    temporary = _empty_sibling(folder)
    pipeline.to(dtype=dtype).save_pretrained(temporary, safe_serialization=True)
    _load_in_float32(temporary)
    _move_into(temporary, folder)


def save_clip(clip: CLIPModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes ``clip`` with its tokenizer and image processor to ``folder``, whole or not at all."""
    temporary = _empty_sibling(folder)
    clip.to(dtype=dtype).save_pretrained(temporary)
    build_tokenizer().save_pretrained(temporary)
    build_image_processor().save_pretrained(temporary)
    _load_in_float32(temporary)
    _move_into(temporary, folder)


def save_part(part: ModelMixin, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes one part of a repository, whole or not at all."""
    temporary = _empty_sibling(folder)
    part.to(dtype=dtype).save_pretrained(temporary, safe_serialization=True)
    path = temporary / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # a folder of the machine that made it
    path.write_text(json.dumps(config, indent=2) + "\n")
    _move_into(temporary, folder)


def _load_in_float32(folder: Path) -> None:
    """Lets transformers' parts load in float32 unless told otherwise, as Diffusers' parts beside them do."""
    for path in (*folder.glob("config.json"), *folder.glob("text_encoder*/config.json")):
        config = json.loads(path.read_text())
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")


def _empty_sibling(folder: Path) -> Path:
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _move_into(temporary: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for item in temporary.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        item.replace(target)
    temporary.rmdir()
