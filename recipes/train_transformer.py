"""Step 3 of the bundled model: the flow transformer and its text encoders, on latents encoded ahead."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from .emoji_scenes.layout import sample_scene
from .emoji_scenes.vocabulary import NUMBERS, RELATIONS
from .optimizers import build_optimizers
from .text import MAX_LENGTH, build_clip_text_encoder, build_t5_encoder, build_tokenizer
from .training_loop import TrainingSettings, adamw, has_bf16, train

DROPPED_CAPTIONS = 0.1
"""Fraction of the captions replaced by the empty one, for classifier-free guidance."""
LONG_TEXTS_AFTER, LONG_TEXTS_EVERY = 0.6, 16
"""From this fraction of the steps on, one step in so many sees T5's default 256 tokens, which a stock call carries, and
a quarter of a batch."""


def build_transformer(*, num_layers: int, num_attention_heads: int, latent_channels: int = 8) -> SD3Transformer2DModel:
    """An untrained transformer for 16x16 latents whose blocks and output start at zero."""
    width = 64 * num_attention_heads
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=num_layers,
        attention_head_dim=64,
        num_attention_heads=num_attention_heads,
        caption_projection_dim=width,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if ".norm1" in name or "norm_out.linear" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return transformer


class FlowMatchingLoss(nn.Module):
    """Rectified-flow loss of a transformer together with the text encoders that it reads.

    The text features are those of ``StableDiffusion3Pipeline``: both CLIP towers' last but one hidden states side by
    side, padded to T5's width and followed by T5's tokens; both pooled outputs side by side.
    """

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder: CLIPTextModelWithProjection = build_clip_text_encoder()
        self.text_encoder_2: CLIPTextModelWithProjection = build_clip_text_encoder()
        self.text_encoder_3: T5EncoderModel = build_t5_encoder()

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Text features (B, 16 + L, 256) and pooled (B, 256) of ids (B, 16) and (B, L)."""
        outputs = [tower(clip_ids, output_hidden_states=True) for tower in (self.text_encoder, self.text_encoder_2)]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        t5 = self.text_encoder_3(t5_ids)[0]
        return torch.cat([clip.to(t5.dtype), t5], 1), torch.cat([output.text_embeds for output in outputs], -1)

    def forward(self, latents: Tensor, noise: Tensor, sigmas: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Mean squared error of the predicted velocity ``noise - latents``, one value an example (B,)."""
        features, pooled = self.encode(clip_ids, t5_ids)
        scale = sigmas.view(-1, 1, 1, 1)
        velocity = self.transformer(
            hidden_states=(1.0 - scale) * latents + scale * noise,
            timestep=sigmas * 1000.0,
            encoder_hidden_states=features,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return (velocity.float() - (noise - latents)).square().mean((1, 2, 3))


@dataclass(frozen=True)
class EncodedScenes:
    """Latents (N, C, 16, 16), normalised to mean 0 and deviation 1 over all, float16, and token ids (N, 16)."""

    latents: Tensor
    token_ids: Tensor
    mean: float
    deviation: float


def encode_scenes(autoencoder: AutoencoderKL, count: int, path: Path, seed: int = 0) -> EncodedScenes:
    """Latents of ``count`` training scenes, from ``path`` where it has them, else encoded and written there."""
    if not path.exists():
        _write_scenes(autoencoder, count, path, seed)
    tensors = load_file(path)
    latents = tensors["latents"]
    mean, deviation = float(tensors["mean"]), float(tensors["deviation"])
    return EncodedScenes(latents, tensors["token_ids"].long(), mean, deviation)


@torch.no_grad()
def _write_scenes(autoencoder: AutoencoderKL, count: int, path: Path, seed: int) -> None:
    device = next(autoencoder.parameters()).device
    tokenizer, latents, captions = build_tokenizer(), [], []
    for start in tqdm(range(0, count, 64), desc="encoding scenes"):
        rng = np.random.default_rng([seed, 2, start])
        scenes = [sample_scene(rng, held_out=False) for _ in range(min(64, count - start))]
        captions += [scene.caption for scene in scenes]
        images = torch.from_numpy(np.stack([scene.render() for scene in scenes])).permute(0, 3, 1, 2) * 2.0 - 1.0
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16()):
            latents.append(autoencoder.encode(images.to(device)).latent_dist.mean.float().cpu())
    stacked = torch.cat(latents)
    mean, deviation = stacked.mean(), stacked.std()
    tensors = {
        "latents": ((stacked - mean) / deviation).half().contiguous(),
        "token_ids": tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(torch.int16),
        "mean": mean,
        "deviation": deviation,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def category_weights(scenes: EncodedScenes, *, one: float, count: float, relation: float) -> Tensor:
    """How often to draw each scene, (N,): by whether its caption has one object, a count or a relation."""
    vocabulary = build_tokenizer().get_vocab()
    counts = torch.tensor([vocabulary[word] for word in NUMBERS])
    relations = torch.tensor([vocabulary[word] for word in RELATIONS])
    weights = torch.full((len(scenes.token_ids),), one)
    weights[torch.isin(scenes.token_ids, counts).any(1)] = count
    weights[torch.isin(scenes.token_ids, relations).any(1)] = relation
    return weights


def t5_ids_of(clip_ids: Tensor, length: int) -> Tensor:
    """T5's ids of the same text: no start token, padded with 0 to ``length``."""
    return nn.functional.pad(clip_ids[:, 1:], (0, length - clip_ids.shape[1] + 1))


def train_transformer(
    module: FlowMatchingLoss,
    scenes: EncodedScenes,
    settings: TrainingSettings,
    folder: Path,
    *,
    max_seconds: float | None,
    weights: Tensor | None = None,
    optimizer: str | None = None,
) -> bool:
    """Trains ``module`` on ``scenes`` with noise levels from a logit-normal distribution.

    Args:
        module: what is trained.
        scenes: from :func:`encode_scenes`.
        settings: see :class:`TrainingSettings`.
        folder: of the checkpoint.
        max_seconds: stop after this time with a checkpoint; None runs to the end.
        weights: how often each scene is drawn, (N,), any scale; None draws all alike.
        optimizer: a name that :func:`build_optimizers` takes; None is :func:`muon_and_adamw`.

    Returns:
        Whether all steps are done.
    """
    empty = build_tokenizer()("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + draw)
        long = step > LONG_TEXTS_AFTER * settings.num_steps and step % LONG_TEXTS_EVERY == 0
        size = settings.batch_size // 4 if long else settings.batch_size
        if weights is None:
            index = torch.randint(len(scenes.latents), (size,), generator=generator)
        else:
            index = torch.multinomial(weights, size, replacement=True, generator=generator)
        latents = scenes.latents[index].float()
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = torch.sigmoid(torch.randn(size, generator=generator))
        dropped = torch.rand(size, generator=generator) < DROPPED_CAPTIONS
        clip_ids = torch.where(dropped[:, None], empty, scenes.token_ids[index])
        t5_ids = t5_ids_of(clip_ids, 256 if long else MAX_LENGTH)
        inputs = (tensor.to(device) for tensor in (latents, noise, sigmas, clip_ids, t5_ids))
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            losses = prepared(*inputs)
        noisy = sigmas.to(device) > 0.7
        return losses.mean(), {"loss_noisy": losses[noisy].detach().mean()}

    optimizers = build_optimizers(optimizer, module, settings) if optimizer else muon_and_adamw(module, settings)
    return train(module, loss_of_step, settings, folder, max_seconds=max_seconds, optimizers=optimizers)


def muon_and_adamw(module: FlowMatchingLoss, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for all other parameters."""
    blocks = {
        f"transformer.{name}" for name, _ in module.transformer.named_parameters() if "transformer_blocks" in name
    }
    matrices = {name: p for name, p in module.named_parameters() if name in blocks and p.ndim == 2}
    muon = torch.optim.Muon(
        matrices.values(), settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = ((name, p) for name, p in module.named_parameters() if name not in matrices)
    return [muon, adamw(rest, settings)]
