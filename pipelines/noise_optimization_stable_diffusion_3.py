"""Stable Diffusion 3, its noise optimized; a custom pipeline, see ``trimtab.pipelines.noise_optimization``."""

from diffusers import StableDiffusion3Pipeline

from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin

__all__ = ["NoiseOptimizationStableDiffusion3Pipeline"]


class NoiseOptimizationStableDiffusion3Pipeline(NoiseOptimizationPipelineMixin, StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline`` whose call looks for noise that makes pictures which rewards like."""
