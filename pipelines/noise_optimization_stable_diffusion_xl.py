"""Stable Diffusion XL, its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import StableDiffusionXLPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationStableDiffusionXLPipeline"]


class NoiseOptimizationStableDiffusionXLPipeline(NoiseOptimizationPipelineMixin, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` whose call looks for noise that makes pictures which rewards like."""
