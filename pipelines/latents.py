"""From a sampler's latents to pictures and back: tokens, normalization, the autoencoder's value range."""

from __future__ import annotations

from typing import Any

import torch

from .families import Family

__all__ = ["decode_latents", "encode_images", "from_tokens", "to_tokens"]


def to_tokens(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Cuts latents into square patches, one token each, frame by frame.

    Args:
        latents: (B, C, h, w) or (B, C, frames, h, w), h and w multiples of `patch`.
        patch: side of a patch in latent pixels.

    Returns:
        (B, frames h w / patch^2, C patch^2), channels slowest within a token.

    Example:
        >>> z = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> to_tokens(z, 2)[0, 0].tolist()
        [0.0, 1.0, 4.0, 5.0]
        >>> bool((from_tokens(to_tokens(z, 2), 2, 4, 4)[:, :, 0] == z).all())
        True
    """
    batch, channels, *_, height, width = latents.shape
    grid = latents.reshape(batch, channels, -1, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def from_tokens(tokens: torch.Tensor, patch: int, height: int, width: int) -> torch.Tensor:
    """Puts tokens back in their places: the inverse of `to_tokens`.

    Args:
        tokens: (B, frames height width / patch^2, C patch^2).
        patch: side of a patch in latent pixels.
        height: of the latents, in latent pixels.
        width: of the latents, in latent pixels.

    Returns:
        (B, C, frames, height, width).
    """
    batch = len(tokens)
    grid = tokens.reshape(batch, -1, height // patch, width // patch, tokens.shape[2] // patch**2, patch, patch)
    return grid.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, grid.shape[4], -1, height, width)


def decode_latents(vae: Any, family: Family, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The pictures of latents, computed as the family's stock pipeline does.

    Args:
        vae: the pipeline's autoencoder.
        family: the pipeline's entry in the table.
        latents: as the stock call takes them, any floating dtype, on the autoencoder's device.
        height: of the latents in latent pixels.
        width: of the latents in latent pixels.

    Returns:
        (B, 3, H, W) in [0, 1], or (B, frames, 3, H, W) of a video, in the autoencoder's dtype. The gradient is
        exact where a value lies inside the range, and 0 where the clamp cut it off.
    """
    z = from_tokens(latents, family.patch, height, width) if family.tokens else latents
    if family.tokens and not family.frame_axis:
        z = z[:, :, 0]
    elif family.frame_axis and z.ndim == 4:
        z = z.unsqueeze(2)
    images = vae.decode(_denormalized(vae, family, z.to(vae.dtype)), return_dict=False)[0]
    if family.frame_axis:
        images = images.permute(0, 2, 1, 3, 4) if family.video else images[:, :, 0]
    return (images * 0.5 + 0.5).clamp(0, 1)


def encode_images(vae: Any, family: Family, images: torch.Tensor) -> torch.Tensor:
    """The latents of pictures: the mode of the autoencoder's posterior, where it has one.

    Args:
        vae: the pipeline's autoencoder.
        family: the pipeline's entry in the table.
        images: (B, 3, H, W) or, of a video, (B, frames, 3, H, W), in [0, 1], any floating dtype, on the
            autoencoder's device.

    Returns:
        Latents as the stock call takes them, which `decode_latents` takes back to about `images`.
    """
    x = images.to(vae.dtype) * 2 - 1
    if family.frame_axis:
        x = x.permute(0, 2, 1, 3, 4) if family.video else x.unsqueeze(2)
    encoded = vae.encode(x)
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    z = _normalized(vae, family, z)
    if family.tokens:
        return to_tokens(z, family.patch)
    return z[:, :, 0] if family.frame_axis and not family.video else z


def _denormalized(vae: Any, family: Family, z: torch.Tensor) -> torch.Tensor:
    """What the autoencoder decodes, in the stock pipelines' order of operations."""
    if family.normalization == "batch-norm":
        mean, std = _batch_statistics(vae, z)
        return _from_channels(z * std + mean)
    statistics = _statistics(vae, z)
    if family.normalization == "statistics":
        mean, std = statistics
        return z / (1.0 / std) + mean
    if statistics is not None:
        mean, std = statistics
        return z * std / vae.config.scaling_factor + mean
    shift = getattr(vae.config, "shift_factor", None)
    z = z / vae.config.scaling_factor
    return z if shift is None else z + shift


def _normalized(vae: Any, family: Family, z: torch.Tensor) -> torch.Tensor:
    """The inverse of `_denormalized`."""
    if family.normalization == "batch-norm":
        z = _to_channels(z)
        mean, std = _batch_statistics(vae, z)
        return (z - mean) / std
    statistics = _statistics(vae, z)
    if family.normalization == "statistics":
        mean, std = statistics
        return (z - mean) * (1.0 / std)
    if statistics is not None:
        mean, std = statistics
        return (z - mean) * vae.config.scaling_factor / std
    shift = getattr(vae.config, "shift_factor", None)
    return (z if shift is None else z - shift) * vae.config.scaling_factor


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation of each channel of an autoencoder's latents, if it tells them."""
    names = ("latents_mean", "latents_std")
    values = [getattr(vae.config, name, None) for name in names]
    if None in values:
        buffers = dict(vae.named_buffers(recurse=False))
        values = [buffers.get(name) for name in names]
    if any(value is None for value in values):
        return None
    shape = (1, -1, *[1] * (like.ndim - 2))
    mean, std = (torch.as_tensor(value).view(shape).to(like.device, like.dtype) for value in values)
    return mean, std


def _batch_statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)


def _to_channels(z: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) to (B, 4 C, h / 2, w / 2): squares of 2x2 pixels as channels."""
    return to_tokens(z, 2).transpose(1, 2).unflatten(2, (z.shape[2] // 2, z.shape[3] // 2))


def _from_channels(z: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_channels`."""
    return from_tokens(z.flatten(2).transpose(1, 2), 2, 2 * z.shape[2], 2 * z.shape[3])[:, :, 0]
