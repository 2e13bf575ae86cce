"""Guidance rules as Diffusers guiders, and ``attach``, which puts them into any pipeline, classic or modular."""

from .adaptive_projected import PRESETS, RESCALE_RMS, AdaptiveProjectedGuidance, adaptive_projected_guidance, project
from .attach import Attachment, attach
from .base import Guidance
from .cfg_plus_plus import CFGPlusPlusGuidance
from .classifier_free import ClassifierFreeGuidance
from .frequency_decoupled import FrequencyDecoupledGuidance, from_laplacian_pyramid, laplacian_pyramid
from .guiders import GUIDERS, make_guider
from .magnitude_aware import MagnitudeAwareGuidance
from .modular import NoisyLatentsStep, with_noisy_latents
from .prediction import AffinePrediction, NoiseSchedule, from_x0, to_x0
from .statistics import contrast, saturation
from .tangential import TangentialClassifierFreeGuidance, tangential
from .tuned_preset import TunedPreset
from .weakened import AutoGuidance, PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
from .wrapper import GuidanceRescale, IntervalGuidance
from .zero_star import ClassifierFreeZeroStarGuidance

__all__ = [
    "GUIDERS",
    "AdaptiveProjectedGuidance",
    "AffinePrediction",
    "Attachment",
    "AutoGuidance",
    "CFGPlusPlusGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "FrequencyDecoupledGuidance",
    "Guidance",
    "GuidanceRescale",
    "IntervalGuidance",
    "MagnitudeAwareGuidance",
    "NoiseSchedule",
    "NoisyLatentsStep",
    "PRESETS",
    "PerturbedAttentionGuidance",
    "RESCALE_RMS",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "TangentialClassifierFreeGuidance",
    "TunedPreset",
    "adaptive_projected_guidance",
    "attach",
    "contrast",
    "from_laplacian_pyramid",
    "from_x0",
    "laplacian_pyramid",
    "make_guider",
    "project",
    "saturation",
    "tangential",
    "to_x0",
    "with_noisy_latents",
]
