"""Step 1 of the bundled model: an autoencoder from 128x128 pictures to 16x16 latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from .emoji_scenes.layout import sample_scene
from .training_loop import TrainingSettings, train

LATENT_CHANNELS = 8


def build_autoencoder(latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """An untrained ``AutoencoderKL`` of stride 8 whose posterior starts narrow: its decoder sees the picture."""
    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 128],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    autoencoder.encoder.conv_out.bias.data[latent_channels:] = -4.0
    return autoencoder


class ReconstructionLoss(nn.Module):
    """Reconstruction and Kullback-Leibler terms of an autoencoder.

    L1 and squared error, weighted up where a picture leaves its ground so that small saturated objects count, L1 of
    the differences between neighbouring pixels for sharp edges, and the divergence from a standard normal.
    """

    def __init__(self, autoencoder: AutoencoderKL, divergence_weight: float = 5e-5) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.divergence_weight = divergence_weight

    def forward(self, images: Tensor, weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes images (B, 3, H, W) in [-1, 1], weights (B, 1, H, W) and noise of the latents' shape.

        Returns:
            the loss, the mean squared error of images in [0, 1] and the divergence, each a scalar.
        """
        posterior = self.autoencoder.encode(images).latent_dist
        output = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample.float()
        error = output - images
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        absolute = (error.abs() * weights).mean()
        squared = (error.square() * weights).mean()
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
        loss = absolute + 2.0 * squared + 0.5 * edges + self.divergence_weight * divergence
        return loss, error.square().mean() / 4.0, divergence


def draw_images(seed: int, step: int, count: int, crop: int = 128) -> tuple[Tensor, Tensor]:
    """Random crops of scenes and the weight of each pixel.

    Three in four lie on the grid of the layouts, the others anywhere.

    Returns:
        images (count, 3, crop, crop) in [-1, 1] and weights (count, 1, crop, crop) of mean about 1, float32.
    """
    rng = np.random.default_rng([seed, step])
    images = np.empty((count, crop, crop, 3), np.float32)
    weights = np.empty((count, crop, crop, 1), np.float32)
    for index in range(count):
        grid = 8 if rng.random() < 0.75 else 1
        scene = sample_scene(rng, held_out=False, grid=grid)
        picture = scene.render()
        ground = picture[:, :1]
        top, left = rng.integers(0, (128 - crop) // grid + 1, 2) * grid
        window = slice(top, top + crop), slice(left, left + crop)
        images[index] = picture[window]
        away = np.abs(picture - ground).max(-1, keepdims=True)[window]
        weights[index] = 0.5 + 1.5 * np.minimum(away * 2.0, 1.0)
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2).mul_(2.0).sub_(1.0),
        torch.from_numpy(weights).permute(0, 3, 1, 2),
    )


def train_autoencoder(
    autoencoder: AutoencoderKL, settings: TrainingSettings, folder: Path, *, crop_steps: int, max_seconds: float | None
) -> bool:
    """Trains on 64x64 crops for ``crop_steps`` steps, four times as many pictures each, then on whole pictures.

    Returns:
        Whether all steps are done.
    """
    module = ReconstructionLoss(autoencoder).to(memory_format=torch.channels_last)

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        crop = 64 if step < crop_steps else 128
        images, weights = draw_images(settings.seed, draw, settings.batch_size, crop)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + draw)
        channels = autoencoder.config.latent_channels
        noise = torch.randn(len(images), channels, crop // 8, crop // 8, generator=generator)
        images = images.to(device, memory_format=torch.channels_last)
        loss, error, divergence = prepared(images, weights.to(device), noise.to(device))
        return loss, {"psnr": -10.0 * torch.log10(error.detach()), "divergence": divergence.detach()}

    return train(module, loss_of_step, settings, folder, max_seconds=max_seconds)


@torch.no_grad()
def measure_autoencoder(autoencoder: AutoencoderKL, count: int = 256, seed: int = 123) -> float:
    """Peak signal-to-noise ratio in dB of held-out scenes, decoded from the mean of their posterior."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out=True).render() for _ in range(count)]
    errors = []
    for start in range(0, count, 32):
        images = torch.from_numpy(np.stack(scenes[start : start + 32])).permute(0, 3, 1, 2)
        latents = autoencoder.encode(images * 2.0 - 1.0).latent_dist.mode()
        output = (autoencoder.decode(latents).sample / 2.0 + 0.5).clamp(0.0, 1.0)
        errors.append(functional.mse_loss(output, images, reduction="none").mean((1, 2, 3)))
    return float((-10.0 * torch.log10(torch.cat(errors))).mean())
