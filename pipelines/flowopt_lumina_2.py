"""Lumina Image 2 with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import Lumina2Pipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptLumina2Pipeline"]


class FlowOptLumina2Pipeline(FlowOptPipelineMixin, Lumina2Pipeline):
    """``Lumina2Pipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
