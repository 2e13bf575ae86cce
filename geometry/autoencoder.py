"""The point-cloud autoencoder: a PointNet encoder and a decoder of plain layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .clouds import check_cloud

__all__ = ["PointCloudAutoencoder", "PointCloudDecoderOutput", "PointCloudEncoderOutput"]


@dataclass
class PointCloudEncoderOutput(BaseOutput):
    """What ``encode`` gives.

    Attributes:
        latents: codes (B, latent_dim).
    """

    latents: Tensor


@dataclass
class PointCloudDecoderOutput(BaseOutput):
    """What ``decode`` and the model's call give.

    Attributes:
        sample: clouds (B, num_points, d).
    """

    sample: Tensor


class PointCloudAutoencoder(ModelMixin, ConfigMixin):
    """Clouds of any size to codes, and codes to clouds of ``num_points``.

    The defaults are the architecture of arXiv 2301.04791 (after PointSWD): the same layers applied to each point, each
    with batch normalization and ReLU, the maximum over points, one linear layer and a unit length; then linear layers
    with batch normalization and ReLU and a last one with tanh, so decoded points lie in [-1, 1]^d. A cloud is
    expected centred and of unit radius, see :func:`~trimtab.geometry.normalize_cloud`. ``save_pretrained`` and
    ``from_pretrained`` are those of Diffusers.

    Args:
        num_points: of decoded clouds.
        in_channels: d, coordinates a point.
        latent_dim: length of a code.
        encoder_channels: widths of the layers applied to each point.
        decoder_channels: widths of the decoder's hidden layers.
        normalize_latents: whether codes have unit length.
        negative_slope: of the activations below zero, >= 0; 0 is the paper's ReLU.

    Example:
        >>> model = PointCloudAutoencoder(num_points=64, encoder_channels=(16, 32), decoder_channels=(32,)).eval()
        >>> model(torch.rand(2, 100, 3) - 0.5).sample.shape
        torch.Size([2, 64, 3])
    """

    @register_to_config
    def __init__(
        self,
        num_points: int = 2048,
        in_channels: int = 3,
        latent_dim: int = 256,
        encoder_channels: Sequence[int] = (64, 64, 64, 128, 1024),
        decoder_channels: Sequence[int] = (1024, 1024),
        normalize_latents: bool = True,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()
        widths = (in_channels, *encoder_channels)
        self.point_layers = _layers(widths)
        self.to_latents = nn.Linear(widths[-1], latent_dim)
        widths = (latent_dim, *decoder_channels)
        self.decoder_layers = _layers(widths)
        self.to_points = nn.Linear(widths[-1], num_points * in_channels)
        # The official code starts its layers a cloud so, and leaves those a point as PyTorch starts them.
        for layer in (self.to_latents, *(layer[0] for layer in self.decoder_layers), self.to_points):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.constant_(layer.bias, 0.01)

    def encode(self, sample: Tensor, return_dict: bool = True) -> PointCloudEncoderOutput | tuple[Tensor]:
        """The codes of clouds.

        Args:
            sample: (B, N, d) floating point, any N >= 1, finite.
            return_dict: as in Diffusers.

        Returns:
            ``latents`` (B, latent_dim).

        Raises:
            TypeError, ValueError: not such clouds.
        """
        check_cloud(sample, "sample")
        if sample.ndim != 3 or sample.shape[-1] != self.config.in_channels:
            wanted = f"(B, N, {self.config.in_channels})"
            raise ValueError(f"`sample` must have shape {wanted}, got {tuple(sample.shape)}")
        features = sample.flatten(0, 1)
        for layer in self.point_layers[:-1]:
            features = self.activation(layer(features))
        features = self.point_layers[-1](features).unflatten(0, sample.shape[:2]).max(1).values
        latents = self.to_latents(self.activation(features))  # it is monotone: after the maximum is as before
        if self.config.normalize_latents:
            latents = nn.functional.normalize(latents, dim=-1)
        return PointCloudEncoderOutput(latents) if return_dict else (latents,)

    def decode(self, latents: Tensor, return_dict: bool = True) -> PointCloudDecoderOutput | tuple[Tensor]:
        """The clouds of codes.

        Args:
            latents: (B, latent_dim).
            return_dict: as in Diffusers.

        Returns:
            ``sample`` (B, num_points, d) in [-1, 1].

        Raises:
            ValueError: another shape.
        """
        if latents.ndim != 2 or latents.shape[-1] != self.config.latent_dim:
            wanted = f"(B, {self.config.latent_dim})"
            raise ValueError(f"`latents` must have shape {wanted}, got {tuple(latents.shape)}")
        features = latents
        for layer in self.decoder_layers:
            features = self.activation(layer(features))
        # Coordinates need more than bfloat16's 8 bits, so the last layer stays out of autocast.
        with torch.autocast(features.device.type, enabled=False):
            sample = self.to_points(features.to(self.to_points.weight.dtype)).tanh()
        sample = sample.unflatten(-1, (-1, self.config.in_channels))
        return PointCloudDecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> PointCloudDecoderOutput | tuple[Tensor]:
        """Encodes and decodes (B, N, d) to (B, num_points, d)."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


def _layers(widths: Sequence[int]) -> nn.ModuleList:
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.ModuleList(nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after)) for before, after in pairs)
