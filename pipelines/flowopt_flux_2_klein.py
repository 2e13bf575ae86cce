"""FLUX.2 klein with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import Flux2KleinPipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptFlux2KleinPipeline"]


class FlowOptFlux2KleinPipeline(FlowOptPipelineMixin, Flux2KleinPipeline):
    """``Flux2KleinPipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
