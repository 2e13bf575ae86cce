"""What a personal reward sees of a picture: features of a frozen CLIP model, and the few directions a head takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .clip import CLIPReward

__all__ = ["FeatureSpace", "feature_count", "person_features", "picture_features"]

DEPTHS = (0.5, 0.75)
"""Shares of the layers after which patch tokens are taken: the last ones serve the text and forget what lies where."""


@dataclass(frozen=True)
class FeatureSpace:
    """z = (features - mean) basis / scale: what a head sees of a picture's features of length 1.

    Attributes:
        mean: (D,).
        basis: (D, d), orthonormal: the directions in which the examples differ most.
        scale: one number, so that z has unit mean square over the examples and directions keep their proportions.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, width: int) -> FeatureSpace:
        """The principal directions of features (N, D), `width` of them at most."""
        mean = features.mean(0)
        centred = features - mean
        _, sizes, basis = torch.linalg.svd(centred.double(), full_matrices=False)
        kept = int((sizes > 1e-6 * sizes[0].clamp_min(1e-300)).sum().clamp(1, width))
        basis = basis[:kept].T.to(features)
        return cls(mean, basis, (centred @ basis).square().mean().sqrt().clamp_min(1e-12))

    def __call__(self, features: Tensor) -> Tensor:
        """(..., D) to (..., d)."""
        return (features - self.mean) @ self.basis / self.scale


def person_features(clip: CLIPReward, images: Tensor) -> Tensor:
    """The projected features beside the mean patch tokens of two inner layers, each of the same length, with gradients.

    The projected features alone are trained to tell captions apart, and lose what a taste can hang on.

    Args:
        clip: the frozen model.
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, D) float32 of length 1.
    """
    parts = [normalize(part, dim=-1) for part in clip.image_and_patch_features(images, DEPTHS)]
    return torch.cat(parts, -1) / len(parts) ** 0.5


@torch.no_grad()
def picture_features(clip: CLIPReward, images: Tensor, batch_size: int = 32) -> Tensor:
    """`person_features` without a gradient, (N, D) float32 of length 1, of pictures (N, 3, H, W) in [0, 1]."""
    return torch.cat([person_features(clip, part) for part in images.split(batch_size)])


def feature_count(clip: CLIPReward) -> int:
    """D."""
    config = clip.model.config
    width = config.vision_config.hidden_size
    return (config.projection_dim if clip.kind == "clip" else width) + len(DEPTHS) * width
