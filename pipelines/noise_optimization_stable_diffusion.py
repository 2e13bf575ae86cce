"""Stable Diffusion 1 and 2, its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import StableDiffusionPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationStableDiffusionPipeline"]


class NoiseOptimizationStableDiffusionPipeline(NoiseOptimizationPipelineMixin, StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose call looks for noise that makes pictures which rewards like."""
