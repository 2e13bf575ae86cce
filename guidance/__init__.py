"""Guidance rules as Diffusers guiders, and ``attach``, which puts them into any classic pipeline."""

from .adaptive_projected import AdaptiveProjectedGuidance, adaptive_projected_guidance, project
from .attach import Attachment, attach
from .base import Guidance
from .classifier_free import ClassifierFreeGuidance
from .prediction import AffinePrediction, NoiseSchedule, from_x0, to_x0
from .statistics import contrast, saturation

__all__ = [
    "GUIDERS",
    "AdaptiveProjectedGuidance",
    "AffinePrediction",
    "Attachment",
    "ClassifierFreeGuidance",
    "Guidance",
    "NoiseSchedule",
    "adaptive_projected_guidance",
    "attach",
    "contrast",
    "from_x0",
    "project",
    "saturation",
    "to_x0",
]

GUIDERS: dict[str, type[Guidance]] = {
    "apg": AdaptiveProjectedGuidance,
    "cfg": ClassifierFreeGuidance,
}
"""Rules by the names that the command line takes."""
