"""Qwen-Image with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from diffusers import QwenImagePipeline

from trimtab.guidance import RESCALE_RMS, AdaptiveProjectedGuidance
from trimtab.pipelines.guided import GuidedPipelineMixin

__all__ = ["GuidedQwenImagePipeline"]


class GuidedQwenImagePipeline(GuidedPipelineMixin, QwenImagePipeline):
    """``QwenImagePipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance at the stock ``true_cfg_scale``, its threshold that of
    SDXL for latents of any size. Neither is a figure of the paper. Without a negative prompt it is a blank one.
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_rescale_rms=RESCALE_RMS)
