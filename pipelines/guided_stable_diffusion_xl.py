"""Stable Diffusion XL with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from diffusers import StableDiffusionXLPipeline

from trimtab.guidance import AdaptiveProjectedGuidance
from trimtab.pipelines.guided import GuidedPipelineMixin

__all__ = ["GuidedStableDiffusionXLPipeline"]


class GuidedStableDiffusionXLPipeline(GuidedPipelineMixin, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance with the preset "sdxl".
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance.from_preset("sdxl")
