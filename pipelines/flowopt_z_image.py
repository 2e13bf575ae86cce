"""Z-Image with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import ZImagePipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptZImagePipeline"]


class FlowOptZImagePipeline(FlowOptPipelineMixin, ZImagePipeline):
    """``ZImagePipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
