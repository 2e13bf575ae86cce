"""AuraFlow with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import AuraFlowPipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptAuraFlowPipeline"]


class FlowOptAuraFlowPipeline(FlowOptPipelineMixin, AuraFlowPipeline):
    """``AuraFlowPipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
