"""Wan (video) with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from typing import Any

from diffusers import WanPipeline
from diffusers.guiders.guider_utils import BaseGuidance

from trimtab.guidance import RESCALE_RMS, AdaptiveProjectedGuidance, Guidance
from trimtab.pipelines.guided import GuidedPipelineMixin, at_scale, inner_guider

__all__ = ["GuidedWanPipeline"]


class GuidedWanPipeline(GuidedPipelineMixin, WanPipeline):
    """``WanPipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance at the stock scale, its threshold that of SDXL for
    latents of any size. Neither is a figure of the paper. ``guidance_scale_2`` is the guider's scale in the
    low-noise stage of Wan 2.2 for a call; without it the scale is the same in both stages.
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_rescale_rms=RESCALE_RMS)

    def _guider_for(self, guider: BaseGuidance, arguments: dict[str, Any], scale: str) -> BaseGuidance:
        guider = super()._guider_for(guider, arguments, scale)
        low, boundary = arguments.get("guidance_scale_2"), self.config.boundary_ratio
        if low is None or boundary is None:  # the stock call refuses a second scale where there is no boundary
            return guider
        if not isinstance(guider, Guidance):
            raise ValueError(f"`guidance_scale_2` needs a guider of trimtab.guidance, got {type(guider).__name__}")
        high = inner_guider(guider).guidance_scale

        def stage_scale(sigma: float) -> float:
            if sigma < boundary - 1e-6:  # of a time rounded to float32
                return low
            return high(sigma) if callable(high) else high

        return at_scale(guider, stage_scale)
