"""Sana, its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import SanaPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationSanaPipeline"]


class NoiseOptimizationSanaPipeline(NoiseOptimizationPipelineMixin, SanaPipeline):
    """``SanaPipeline`` whose call looks for noise that makes pictures which rewards like."""
