"""From a sampler's latents to pictures and back: tokens, normalization, the autoencoder's value range."""

from __future__ import annotations

from typing import Any

import torch

from .families import Family

__all__ = ["decode_latents", "encode_images", "from_tokens", "to_tokens"]


def to_tokens(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Cuts latents into square patches, one token each.

    Args:
        latents: (B, C, h, w), h and w multiples of `patch`.
        patch: side of a patch in latent pixels.

    Returns:
        (B, h w / patch^2, C patch^2), channels slowest within a token.

    Example:
        >>> z = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> to_tokens(z, 2)[0, 0].tolist()
        [0.0, 1.0, 4.0, 5.0]
        >>> bool((from_tokens(to_tokens(z, 2), 2, 4, 4) == z).all())
        True
    """
    batch, channels, height, width = latents.shape
    grid = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_tokens(tokens: torch.Tensor, patch: int, height: int, width: int) -> torch.Tensor:
    """Puts tokens back in their places: the inverse of `to_tokens`.

    Args:
        tokens: (B, height width / patch^2, C patch^2).
        patch: side of a patch in latent pixels.
        height: of the latents, in latent pixels.
        width: of the latents, in latent pixels.

    Returns:
        (B, C, height, width).
    """
    grid = tokens.reshape(tokens.shape[0], height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def decode_latents(vae: Any, family: Family, latents: torch.Tensor) -> torch.Tensor:
    """The pictures of latents, computed as the family's stock pipeline does.

    Args:
        vae: the pipeline's autoencoder.
        family: the pipeline's entry in the table.
        latents: (B, C, h, w), any dtype and device.

    Returns:
        (B, 3, H, W) in [0, 1], in the autoencoder's dtype. The gradient is exact where a value lies inside
        the range, and 0 where the clamp cut it off.
    """
    z = latents.to(vae.device, vae.dtype)
    z = z.unsqueeze(2) if family.frames else z
    if family.normalization == "statistics":
        mean, inverse_std = _statistics(vae, z)
        z = z / inverse_std + mean
    else:
        mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(z.device, z.dtype) for value in (mean, std))
            z = z * std / vae.config.scaling_factor + mean
        else:
            shift = getattr(vae.config, "shift_factor", None)
            z = z / vae.config.scaling_factor
            z = z if shift is None else z + shift
    images = vae.decode(z, return_dict=False)[0]
    images = images[:, :, 0] if family.frames else images
    return (images * 0.5 + 0.5).clamp(0, 1)


def encode_images(vae: Any, family: Family, images: torch.Tensor) -> torch.Tensor:
    """The latents of pictures: the mode of the autoencoder's posterior, where it has one.

    Args:
        vae: the pipeline's autoencoder.
        family: the pipeline's entry in the table.
        images: (B, 3, H, W) in [0, 1], any dtype and device.

    Returns:
        (B, C, h, w), in the autoencoder's dtype; `decode_latents` takes it back to about `images`.
    """
    x = images.to(vae.device, vae.dtype) * 2 - 1
    encoded = vae.encode(x.unsqueeze(2) if family.frames else x)
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    if family.normalization == "statistics":
        mean, inverse_std = _statistics(vae, z)
        z = (z - mean) * inverse_std
    else:
        mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(z.device, z.dtype) for value in (mean, std))
            z = (z - mean) * vae.config.scaling_factor / std
        else:
            shift = getattr(vae.config, "shift_factor", None)
            z = z if shift is None else z - shift
            z = z * vae.config.scaling_factor
    return z[:, :, 0] if family.frames else z


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / std of each channel, in the order of operations of the stock pipelines."""
    shape = (1, -1, *[1] * (like.ndim - 2))
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(like.device, like.dtype)
    return mean, 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(like.device, like.dtype)
