"""Reconstructs point clouds with a trained autoencoder, interpolates between them and draws new ones.

A custom pipeline: ``custom_pipeline=`` loads this file as it stands, and Diffusers then runs a copy of it from its
cache. So it imports by full names, and it defines one pipeline class only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from trimtab.geometry import (
    LatentFlow,
    PointCloudAutoencoder,
    chamfer_distance,
    load_point_cloud,
    normalize_cloud,
    sliced_wasserstein,
)

__all__ = ["PointCloudCodes", "PointCloudOutput", "PointCloudReconstructionPipeline"]


@dataclass
class PointCloudCodes(BaseOutput):
    """Clouds as codes, with the frames that they came in.

    Attributes:
        latents: (B, latent_dim).
        centres: (B, 1, 3), the clouds' means.
        radii: (B, 1, 1), their largest distances from them.
    """

    latents: Tensor
    centres: Tensor
    radii: Tensor


@dataclass
class PointCloudOutput(BaseOutput):
    """What the pipeline gives.

    Attributes:
        clouds: (B, num_points, 3), in the frame of the inputs.
        latents: their codes, (B, latent_dim).
        distances: between inputs and reconstructions, both of unit radius: ``"chamfer"`` (mean squared, both ways)
            and ``"sliced_wasserstein"`` (``SW_2^2``), each (B,); empty for clouds that are no reconstructions.
    """

    clouds: Tensor
    latents: Tensor
    distances: dict[str, Tensor]


class PointCloudReconstructionPipeline(DiffusionPipeline):
    """Files, meshes and arrays to clouds of one size that mean the same, through short codes.

    Args:
        autoencoder: clouds of unit radius to codes and back.
        flow: velocity between codes and noise, for :meth:`generate`; may be missing.
        scheduler: of the flow; may be missing.

    Example:
        >>> autoencoder = PointCloudAutoencoder(num_points=32, encoder_channels=(8,), decoder_channels=(8,)).eval()
        >>> pipe = PointCloudReconstructionPipeline(autoencoder)
        >>> pipe(torch.randn(100, 3)).clouds.shape
        torch.Size([1, 32, 3])
    """

    model_cpu_offload_seq = "flow->autoencoder"
    _optional_components = ["flow", "scheduler"]

    def __init__(
        self,
        autoencoder: PointCloudAutoencoder,
        flow: LatentFlow | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder, flow=flow, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, clouds: Any, *, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> PointCloudOutput | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructs clouds.

        Args:
            clouds: whatever :func:`~trimtab.geometry.load_point_cloud` takes (the path of a PLY, OBJ, STL, GLB, NPZ or
                XYZ file, a mesh, an array (N, 3)), a list of such, or a tensor (B, N, 3). Meshes are sampled, and
                larger clouds subsampled, to the autoencoder's number of points.
            generator: of that choice, on the CPU.
            return_dict: as in Diffusers.

        Returns:
            The reconstructions in the inputs' frame, their codes and how far they are from the inputs.

        Raises:
            FileNotFoundError, TypeError, ValueError: a cloud cannot be used; the message names it.
        """
        points = self._load(clouds, generator)
        codes = self._encode(points)
        decoded = self.decode(codes)
        restored = (decoded - codes.centres) / codes.radii
        distances: dict[str, list[Tensor]] = {"chamfer": [], "sliced_wasserstein": []}
        for cloud, reconstruction in zip(points, restored, strict=True):
            unit = normalize_cloud(cloud.to(reconstruction))[0]
            distances["chamfer"].append(chamfer_distance(unit, reconstruction))
            slices = {"num_projections": 200, "directions": "quasi"}
            fixed = torch.Generator().manual_seed(0)
            distances["sliced_wasserstein"].append(sliced_wasserstein(unit, reconstruction, generator=fixed, **slices))
        stacked = {name: torch.stack(values) for name, values in distances.items()}
        if not return_dict:
            return decoded, codes.latents, stacked
        return PointCloudOutput(decoded, codes.latents, stacked)

    @torch.no_grad()
    def encode(self, clouds: Any, *, generator: torch.Generator | None = None) -> PointCloudCodes:
        """The codes of clouds, and their frames; arguments and errors as in the call."""
        return self._encode(self._load(clouds, generator))

    @torch.no_grad()
    def decode(self, codes: PointCloudCodes | Tensor) -> Tensor:
        """The clouds of codes (B, latent_dim), (B, num_points, 3) float32: of unit radius, or in their frames."""
        latents = codes if isinstance(codes, Tensor) else codes.latents
        clouds = self.autoencoder.decode(latents.to(self._execution_device, self.autoencoder.dtype)).sample.float()
        return clouds if isinstance(codes, Tensor) else clouds * codes.radii + codes.centres

    @torch.no_grad()
    def interpolate(
        self, first: Any, last: Any, *, num_clouds: int = 8, generator: torch.Generator | None = None
    ) -> PointCloudOutput:
        """Clouds from one to another, at even steps between their codes (along the sphere if codes lie on one).

        Args:
            first: a cloud as in the call.
            last: likewise.
            num_clouds: how many, both ends included, >= 2.
            generator: as in the call.

        Returns:
            Clouds of unit radius.

        Raises:
            ValueError: fewer than two clouds, or what cannot be used.
        """
        if num_clouds < 2:
            raise ValueError(f"`num_clouds` must be at least 2, got {num_clouds}")
        start, end = (self.encode([cloud], generator=generator).latents[0] for cloud in (first, last))
        steps = torch.linspace(0.0, 1.0, num_clouds, device=start.device, dtype=start.dtype)[:, None]
        if self.autoencoder.config.normalize_latents:
            angle = torch.arccos((start @ end).clamp(-1.0, 1.0)).clamp_min(1e-4)
            latents = (((1 - steps) * angle).sin() * start + (steps * angle).sin() * end) / angle.sin()
        else:
            latents = torch.lerp(start, end, steps)
        return PointCloudOutput(self.decode(latents), latents, {})

    @torch.no_grad()
    def generate(
        self,
        num_clouds: int = 1,
        *,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> PointCloudOutput:
        """Draws new clouds: noise through the flow to codes, codes through the decoder.

        Args:
            num_clouds: how many, >= 1.
            num_inference_steps: of the scheduler.
            generator: of the noise, on any device.

        Returns:
            Clouds of unit radius.

        Raises:
            ValueError: the pipeline has no flow, or a number below 1.
        """
        if self.flow is None or self.scheduler is None:
            raise ValueError("`generate` needs a flow and a scheduler; this pipeline reconstructs only")
        if num_clouds < 1 or num_inference_steps < 1:
            numbers = f"{num_clouds} and {num_inference_steps}"
            raise ValueError(f"`num_clouds` and `num_inference_steps` must be at least 1, got {numbers}")
        device, dtype = self._execution_device, self.flow.dtype
        drawn_on = generator.device if generator is not None else device
        shape = (num_clouds, self.flow.config.latent_dim)
        sample = torch.randn(shape, generator=generator, device=drawn_on).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            velocity = self.flow(sample.to(dtype), timestep[None].to(dtype)).sample.float()
            sample = self.scheduler.step(velocity, timestep, sample).prev_sample
        latents = self.flow.restore(sample)
        if self.autoencoder.config.normalize_latents:
            latents = torch.nn.functional.normalize(latents, dim=-1)
        return PointCloudOutput(self.decode(latents), latents, {})

    def _load(self, clouds: Any, generator: torch.Generator | None) -> list[Tensor]:
        several = isinstance(clouds, Sequence) and not isinstance(clouds, str) and not _is_cloud(clouds)
        if not several and not (hasattr(clouds, "ndim") and clouds.ndim == 3):
            clouds = [clouds]
        if len(clouds) == 0:
            raise ValueError("`clouds` must hold at least one cloud, got none")
        count = self.autoencoder.config.num_points
        return [load_point_cloud(cloud, num_points=count, generator=generator) for cloud in clouds]

    def _encode(self, clouds: list[Tensor]) -> PointCloudCodes:
        device, dtype = self._execution_device, self.autoencoder.dtype
        latents, centres, radii = [], [], []
        for cloud in clouds:
            unit, centre, radius = normalize_cloud(cloud.to(device))
            latents.append(self.autoencoder.encode(unit[None].to(dtype)).latents[0].float())
            centres.append(centre)
            radii.append(radius)
        return PointCloudCodes(torch.stack(latents), torch.stack(centres), torch.stack(radii))


def _is_cloud(value: Sequence[Any]) -> bool:
    """Whether nested lists are the points of one cloud."""
    return (
        bool(len(value)) and isinstance(value[0], (list, tuple)) and all(isinstance(x, (int, float)) for x in value[0])
    )
