"""CFG-Zero* (Fan et al., arXiv 2503.18886)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import (
    BaseGuidance,  # noqa: F401  loading looks for it here
    GuiderOutput,
)

from .base import COND, Guidance, Scale

__all__ = ["ClassifierFreeZeroStarGuidance"]


class ClassifierFreeZeroStarGuidance(Guidance):
    """CFG-Zero*, for flow matching: a better scaled unconditional velocity, and no move at first.

        a = <c, u> / (||u||^2 + 1e-8) for each item;  g = a u + w (c - a u);  g = 0 in the first steps

    Args:
        guidance_scale: w, or a callable w(sigma).
        zero_init_steps: how many steps at the start are not moved at all.
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if a number is out of range.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale = 7.5,
        zero_init_steps: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, start, stop, enabled)
        if not isinstance(zero_init_steps, int) or zero_init_steps < 0:
            raise ValueError(f"`zero_init_steps` must be an integer >= 0, got {zero_init_steps!r}")
        self.zero_init_steps = zero_init_steps

    @property
    def _is_zero_step(self) -> bool:
        return self._step is not None and self._step < self.zero_init_steps and self.is_guided

    @property
    def wanted(self) -> list[str]:
        return [COND] if self._is_zero_step else super().wanted

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        if self._is_zero_step:
            return GuiderOutput(pred=torch.zeros_like(pred_cond), pred_cond=pred_cond, pred_uncond=pred_uncond)
        return super().forward(pred_cond, pred_uncond)

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(pred_cond.dtype, torch.float32)
        c, u = pred_cond.to(wide).flatten(1), pred_uncond.to(wide).flatten(1)
        a = (c * u).sum(1, keepdim=True) / ((u * u).sum(1, keepdim=True) + 1e-8)
        g = a * u + self.scale * (c - a * u)
        return g.to(pred_cond.dtype).view_as(pred_cond)
