"""Z-Image (and Turbo), its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import ZImagePipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationZImagePipeline"]


class NoiseOptimizationZImagePipeline(NoiseOptimizationPipelineMixin, ZImagePipeline):
    """``ZImagePipeline`` whose call looks for noise that makes pictures which rewards like."""
