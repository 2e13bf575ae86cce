"""Stable Diffusion XL with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import StableDiffusionXLPipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptStableDiffusionXLPipeline"]


class FlowOptStableDiffusionXLPipeline(FlowOptPipelineMixin, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` whose call edits pictures and whose ``invert`` finds their noise, through DDIM."""
