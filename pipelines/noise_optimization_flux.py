"""FLUX.1 (schnell and dev), its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import FluxPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationFluxPipeline"]


class NoiseOptimizationFluxPipeline(NoiseOptimizationPipelineMixin, FluxPipeline):
    """``FluxPipeline`` whose call looks for noise that makes pictures which rewards like."""
