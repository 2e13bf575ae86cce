"""Sana with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import SanaPipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptSanaPipeline"]


class FlowOptSanaPipeline(FlowOptPipelineMixin, SanaPipeline):
    """``SanaPipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
