"""Tangential classifier-free guidance, TCFG (Kwon et al., arXiv 2503.18137)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  loading looks for it here

from .adaptive_projected import dot
from .base import Guidance, Scale

__all__ = ["TangentialClassifierFreeGuidance", "tangential"]


def tangential(pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
    """The unconditional prediction along the direction that both predictions share.

    With the first right-singular vector v of the 2xN matrix [c; u], this is ``<u, v> v``. It follows from the
    leading eigenvector (p, q) of the 2x2 Gram matrix: v = (p c + q u) / ||p c + q u||, so no decomposition of a
    2xN matrix is needed.

    Args:
        pred_cond: c, (B, ...), any floating dtype.
        pred_uncond: u, same shape.

    Returns:
        Same shape and dtype as ``pred_uncond``; products in float64 (float32 on MPS).
    """
    wide = torch.float32 if pred_cond.device.type == "mps" else torch.float64
    c, u = pred_cond.flatten(1).to(wide), pred_uncond.flatten(1).to(wide)
    cc, cu, uu = dot(c, c), dot(c, u), dot(u, u)
    # Leading eigenvector at angle t of [[cc, cu], [cu, uu]]: tan 2t = 2 cu / (cc - uu). torch.linalg.eigh would
    # wait for a GPU.
    t = 0.5 * torch.atan2(2 * cu, cc - uu)
    p, q = torch.cos(t), torch.sin(t)
    square = p * p * cc + 2 * p * q * cu + q * q * uu  # ||p c + q u||^2
    along = (p * cu + q * uu) / torch.where(square > 0, square, 1.0)  # <u, p c + q u> / ||.||^2
    result = (along * p)[:, None] * c + (along * q)[:, None] * u
    return result.to(pred_uncond.dtype).view_as(pred_uncond)


class TangentialClassifierFreeGuidance(Guidance):
    """TCFG: the unconditional prediction loses what it does not share with the conditional one.

        u~ = <u, v> v,  v the first right-singular vector of [c; u];    g = u~ + w (c - u~)

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
        shared = tangential(pred_cond, pred_uncond)
        return shared + self.scale * (pred_cond - shared)
