"""PixArt-Sigma, its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import PixArtSigmaPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationPixArtSigmaPipeline"]


class NoiseOptimizationPixArtSigmaPipeline(NoiseOptimizationPipelineMixin, PixArtSigmaPipeline):
    """``PixArtSigmaPipeline`` whose call looks for noise that makes pictures which rewards like."""
