"""Stable Diffusion 3 and 3.5 with a guider; a custom pipeline, see ``trimtab.pipelines.guided``."""

from diffusers import StableDiffusion3Pipeline

from trimtab.guidance import AdaptiveProjectedGuidance
from trimtab.pipelines.guided import GuidedPipelineMixin

__all__ = ["GuidedStableDiffusion3Pipeline"]


class GuidedStableDiffusion3Pipeline(GuidedPipelineMixin, StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline`` whose call takes ``guider=``.

    The guider to begin with is adaptive projected guidance with the preset "sd3".
    """

    @classmethod
    def default_guider(cls) -> AdaptiveProjectedGuidance:
        return AdaptiveProjectedGuidance.from_preset("sd3")
