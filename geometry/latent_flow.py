"""A small flow model over the autoencoder's codes, so that new clouds can be drawn."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import Tensor, nn

__all__ = ["LatentFlow", "LatentFlowOutput"]


@dataclass
class LatentFlowOutput(BaseOutput):
    """What the flow's call gives.

    Attributes:
        sample: the velocity, noise minus data, (B, latent_dim).
    """

    sample: Tensor


class LatentFlow(ModelMixin, ConfigMixin):
    r"""The velocity :math:`v(z_t, t)` of a rectified flow between codes and noise.

    With :math:`z_\sigma = (1 - \sigma) z + \sigma \epsilon` it predicts :math:`\epsilon - z`, as
    ``FlowMatchEulerDiscreteScheduler`` takes it (Liu et al. 2022, arXiv 2209.03003). Residual layers whose scale and
    shift depend on the time.

    Args:
        latent_dim: length of a code.
        hidden_dim: width of the layers.
        num_layers: how many.
        latent_mean: subtracted from codes before the flow sees them.
        latent_deviation: divides them then.

    Example:
        >>> import torch
        >>> flow = LatentFlow(latent_dim=8, hidden_dim=16, num_layers=1)
        >>> flow(torch.randn(4, 8), torch.tensor([1000.0])).sample.shape
        torch.Size([4, 8])
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 256,
        hidden_dim: int = 512,
        num_layers: int = 4,
        latent_mean: float = 0.0,
        latent_deviation: float = 1.0,
    ) -> None:
        super().__init__()
        self.time_projection = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, hidden_dim)
        self.to_hidden = nn.Linear(latent_dim, hidden_dim)
        self.layers = nn.ModuleList(_ResidualLayer(hidden_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.to_velocity = nn.Linear(hidden_dim, latent_dim)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> LatentFlowOutput | tuple[Tensor]:
        """The velocity.

        Args:
            sample: (B, latent_dim), standardized codes with noise.
            timestep: (B,) or (1,) in [0, 1000], 1000 times sigma.
            return_dict: as in Diffusers.

        Returns:
            ``sample`` (B, latent_dim).
        """
        time = self.time_projection(timestep.expand(len(sample))).to(sample.dtype)
        condition = self.time_embedding(time)
        hidden = self.to_hidden(sample)
        for layer in self.layers:
            hidden = layer(hidden, condition)
        velocity = self.to_velocity(self.norm(hidden))
        return LatentFlowOutput(velocity) if return_dict else (velocity,)

    def standardize(self, latents: Tensor) -> Tensor:
        """Codes as the flow sees them."""
        return (latents - self.config.latent_mean) / self.config.latent_deviation

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`standardize`."""
        return latents * self.config.latent_deviation + self.config.latent_mean


class _ResidualLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(nn.functional.silu(condition)).chunk(3, dim=-1)
        return hidden + gate * self.inner(self.norm(hidden) * (1.0 + scale) + shift)
