"""Sana-Sprint, its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import SanaSprintPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationSanaSprintPipeline"]


class NoiseOptimizationSanaSprintPipeline(NoiseOptimizationPipelineMixin, SanaSprintPipeline):
    """``SanaSprintPipeline`` whose call looks for noise that makes pictures which rewards like."""
