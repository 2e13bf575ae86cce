"""FLUX.1 with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import FluxPipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptFluxPipeline"]


class FlowOptFluxPipeline(FlowOptPipelineMixin, FluxPipeline):
    """``FluxPipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
