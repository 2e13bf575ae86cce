"""PixArt-Sigma with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from diffusers import PixArtSigmaPipeline

from trimtab.guidance import RESCALE_RMS, AdaptiveProjectedGuidance
from trimtab.pipelines.guided import GuidedPipelineMixin

__all__ = ["GuidedPixArtSigmaPipeline"]


class GuidedPixArtSigmaPipeline(GuidedPipelineMixin, PixArtSigmaPipeline):
    """``PixArtSigmaPipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance at the stock scale, its threshold that of SDXL
    for latents of any size. Neither is a figure of the paper.
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance(guidance_scale=4.5, adaptive_projected_guidance_rescale_rms=RESCALE_RMS)
