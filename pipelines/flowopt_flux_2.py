"""FLUX.2 with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import Flux2Pipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptFlux2Pipeline"]


class FlowOptFlux2Pipeline(FlowOptPipelineMixin, Flux2Pipeline):
    """``Flux2Pipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
