"""FLUX.1 with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from diffusers import FluxPipeline

from trimtab.guidance import RESCALE_RMS, AdaptiveProjectedGuidance
from trimtab.pipelines.guided import GuidedPipelineMixin

__all__ = ["GuidedFluxPipeline"]


class GuidedFluxPipeline(GuidedPipelineMixin, FluxPipeline):
    """``FluxPipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance at a low scale, since ``guidance_scale``, an input of the
    network, guides already; its threshold is that of SDXL for latents of any size. Neither is a figure of the paper.
    ``true_cfg_scale`` sets the scale for a call. Without a negative prompt it is a blank one.
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance(guidance_scale=2.0, adaptive_projected_guidance_rescale_rms=RESCALE_RMS)
