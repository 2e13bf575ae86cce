"""CFG++ (Chung, Kim, Park, Nam, Ye, arXiv 2406.08070)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  loading looks for it here

from .base import Guidance, Scale, check_finite

__all__ = ["CFGPlusPlusGuidance"]


class CFGPlusPlusGuidance(Guidance):
    """CFG++: the denoised prediction is guided, the noise that is put back is the unconditional one.

        D = D_u + lambda (D_c - D_u)            x' = alpha' D + sigma' eps_u

    A first-order deterministic step is linear in the network's output, so the same x' comes from an ordinary step on

        g = u + w (c - u),    w = lambda s / (s - s'),    s = sigma / alpha,  s' at the step's end,

    in every parametrisation. Exact therefore for DDIM (eta = 0), Euler and flow-matching Euler; multistep solvers
    (DPM-Solver++, UniPC) get that g at each evaluation, their correction included.

    Args:
        guidance_scale: lambda, in [0, 1], or a callable lambda(sigma).
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if a number is out of range.
    """

    needs_sample = True

    @register_to_config
    def __init__(self, guidance_scale: Scale = 0.6, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        super().__init__(guidance_scale, start, stop, enabled)
        if not callable(guidance_scale):
            check_finite("guidance_scale (lambda of CFG++)", guidance_scale, low=0.0, high=1.0)

    @property
    def guides(self) -> bool:
        # lambda = 1 still puts the unconditional noise back, so no lambda means "no guidance"
        return self._enabled

    @property
    def is_guided(self) -> bool:
        return self.guides and self.in_window

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        if self._prediction is None or self._next_prediction is None:
            raise RuntimeError("CFG++ needs the noise levels of the step: use attach(), or call set_sample()")
        here, after = self._prediction, self._next_prediction
        # s / (s - s') with s = sigma / alpha, multiplied out: alpha is 0 for pure noise
        span = here.sigma * after.alpha - after.sigma * here.alpha
        if span == 0:
            return pred_uncond  # the step goes nowhere
        w = self.scale * here.sigma * after.alpha / span
        return pred_uncond + w * (pred_cond - pred_uncond)
