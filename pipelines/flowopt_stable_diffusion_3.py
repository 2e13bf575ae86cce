"""Stable Diffusion 3 and 3.5 with FlowOpt; a custom pipeline, see ``trimtab.pipelines.flowopt``."""

from diffusers import StableDiffusion3Pipeline

from trimtab.pipelines.flowopt import FlowOptPipelineMixin

__all__ = ["FlowOptStableDiffusion3Pipeline"]


class FlowOptStableDiffusion3Pipeline(FlowOptPipelineMixin, StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline`` whose call edits pictures and whose ``invert`` finds their noise."""
