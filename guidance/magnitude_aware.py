"""MAMBO-G, magnitude-aware guidance (arXiv 2508.03442)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  loading looks for it here

from .base import Guidance, Scale, check_finite

__all__ = ["MagnitudeAwareGuidance"]


class MagnitudeAwareGuidance(Guidance):
    """MAMBO-G: a scale that shrinks where the two predictions are far apart, as they are at first.

        g = u + (1 + (w - 1) exp(-alpha ||c - u|| / ||u||)) (c - u) for each item

    Args:
        guidance_scale: w, or a callable w(sigma).
        alpha: how fast the scale falls, >= 0; 0 is plain guidance.
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if a number is out of range.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale = 10.0,
        alpha: float = 8.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, start, stop, enabled)
        check_finite("alpha", alpha, low=0.0)
        self.alpha = alpha

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(pred_cond.dtype, torch.float32)
        c, u = pred_cond.to(wide).flatten(1), pred_uncond.to(wide).flatten(1)
        d = c - u
        ratio = torch.linalg.vector_norm(d, dim=1, keepdim=True) / torch.linalg.vector_norm(
            u, dim=1, keepdim=True
        ).clamp_min(torch.finfo(wide).tiny)
        scale = 1 + (self.scale - 1) * torch.exp(-self.alpha * ratio)
        return (u + scale * d).to(pred_cond.dtype).view_as(pred_cond)
