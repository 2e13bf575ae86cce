"""A folder of captioned pictures, and what a Stable Diffusion 3 pipeline makes of them before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from .emoji_scenes import BACKGROUNDS, OBJECTS, ObjectKind, SceneFacts, sample_scene
from .emoji_scenes.new_object import known_object

__all__ = ["EncodedPictures", "encode_pictures", "object_facts", "read_pictures", "write_object_scenes"]


@dataclass(frozen=True)
class EncodedPictures:
    """What is trained on, float32 on the CPU.

    Attributes:
        latents: (N, C, h, w), scaled as the transformer wants them.
        features: text features (N, L, D).
        pooled: (N, P).
        no_features, no_pooled: of the empty caption, (1, L, D) and (1, P).
    """

    latents: Tensor
    features: Tensor
    pooled: Tensor
    no_features: Tensor
    no_pooled: Tensor


def read_pictures(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """Pictures and captions of a folder as datasets' "imagefolder" reads them.

    Args:
        folder: holds ``metadata.jsonl``, one line a picture: ``{"file_name": "a.png", "text": "a bell"}``.

    Raises:
        FileNotFoundError: no ``metadata.jsonl``.
        ValueError: a line without these entries, a picture that is missing or lies elsewhere, or none at all.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"`data` {folder} has no metadata.jsonl with a line for each picture")
    pictures, captions = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"`data`: line {number} of {path} is not an object with file_name and text") from None
        file = (folder / str(name)).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            raise ValueError(f"`data`: line {number} of {path} names {name!r}, which is no file in the folder")
        with Image.open(file) as image:
            pictures.append(image.convert("RGB"))
        captions.append(str(text))
    if not pictures:
        raise ValueError(f"`data`: {path} names no picture")
    return pictures, captions


@torch.no_grad()
def encode_pictures(
    pipe: StableDiffusion3Pipeline,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    max_sequence_length: int = 16,
) -> EncodedPictures:
    """Latents and text features of pictures, which are cropped to a square and resized to the model's size.

    Args:
        pipe: its autoencoder and text encoders are used as they are.
        pictures: N of them.
        captions: N of them.
        max_sequence_length: tokens of T5.
    """
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    arrays = [np.asarray(_square(picture, side), np.float32) / 127.5 - 1.0 for picture in pictures]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(pipe.device, pipe.vae.dtype)
    config = pipe.vae.config
    latents = torch.cat([pipe.vae.encode(part).latent_dist.mean.float() for part in images.split(16)])
    latents = (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def texts(prompts: list[str]) -> tuple[Tensor, Tensor]:
        outputs = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return outputs[0].float().cpu(), outputs[2].float().cpu()

    parts = [texts(list(captions[start : start + 16])) for start in range(0, len(captions), 16)]
    features, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
    return EncodedPictures(latents.cpu(), features, pooled, *texts([""]))


def _square(picture: Image.Image, side: int) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def object_facts(kind: ObjectKind, count: int, seed: int) -> list[SceneFacts]:
    """What ``count`` scenes of an object state: alone, two to four of it, and beside a known object, in turn.

    The same seed gives the same facts; scenes with another object have it at any side, told from either.
    """
    rng = np.random.default_rng([seed, 5])
    grounds = [name for name in BACKGROUNDS for _ in range(-(-count // len(BACKGROUNDS)))]
    rng.shuffle(grounds)
    others = [name for name in OBJECTS if name != kind.name]
    facts = []
    for number in range(count):
        turn, ground = number % 3, grounds[number]
        if turn == 2:
            pair = [kind.name, others[rng.integers(len(others))]]
            rng.shuffle(pair)
            relation = ("left", "right", "above", "below")[rng.integers(4)]
            facts.append(SceneFacts(tuple(map(str, pair)), 1, relation, ground))
        else:
            facts.append(SceneFacts((kind.name,), 1 if turn == 0 else int(rng.integers(2, 5)), None, ground))
    return facts


def write_object_scenes(kind: ObjectKind, folder: Path, *, count: int = 50, seed: int = 0) -> Path:
    """Writes ``count`` captioned scenes of an object, as :func:`read_pictures` takes them; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng([seed, 6]), []
    with known_object(kind):
        for number, facts in enumerate(object_facts(kind, count, seed)):
            scene = sample_scene(rng, facts)
            scene.to_image().save(folder / f"{number:04d}.png")
            lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": scene.caption}))
    temporary = folder / "metadata.jsonl.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(folder / "metadata.jsonl")
    return folder
