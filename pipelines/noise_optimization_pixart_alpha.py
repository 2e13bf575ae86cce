"""PixArt-alpha (and DMD), its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import PixArtAlphaPipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationPixArtAlphaPipeline"]


class NoiseOptimizationPixArtAlphaPipeline(NoiseOptimizationPipelineMixin, PixArtAlphaPipeline):
    """``PixArtAlphaPipeline`` whose call looks for noise that makes pictures which rewards like."""
