"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  loading looks for it here

from .base import Guidance, Scale

__all__ = ["ClassifierFreeGuidance"]


class ClassifierFreeGuidance(Guidance):
    """Classifier-free guidance in the form that pipelines use (arXiv 2207.12598; Imagen, arXiv 2205.11487).

        g = u + w (c - u)

    It is affine, so it is the same in x0 space and in the network's own; it needs no latents.

    Args:
        guidance_scale: w, or a callable w(sigma).
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if a number is out of range.
    """

    @register_to_config
    def __init__(self, guidance_scale: Scale = 7.5, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        super().__init__(guidance_scale, start, stop, enabled)

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        return pred_uncond + self.scale * (pred_cond - pred_uncond)
