"""Qwen-Image with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import QwenImagePipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptQwenImagePipeline"]


class FlowOptQwenImagePipeline(FlowOptPipelineMixin, QwenImagePipeline):
    """``QwenImagePipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
