"""Stable Diffusion 1.x and 2.x with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import StableDiffusionPipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptStableDiffusionPipeline"]


class FlowOptStableDiffusionPipeline(FlowOptPipelineMixin, StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose call edits pictures and whose ``invert`` finds their noise, through DDIM."""
