"""Stable Diffusion 1.x and 2.x with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from diffusers import StableDiffusionPipeline

from trimtab.guidance import AdaptiveProjectedGuidance
from trimtab.pipelines.guided import GuidedPipelineMixin

__all__ = ["GuidedStableDiffusionPipeline"]


class GuidedStableDiffusionPipeline(GuidedPipelineMixin, StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance with the preset "sd2.1".
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance.from_preset("sd2.1")
