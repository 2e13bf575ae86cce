"""Guidance rules by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .adaptive_projected import PRESETS, RESCALE_RMS, AdaptiveProjectedGuidance
from .base import Guidance
from .cfg_plus_plus import CFGPlusPlusGuidance
from .classifier_free import ClassifierFreeGuidance
from .frequency_decoupled import FrequencyDecoupledGuidance
from .magnitude_aware import MagnitudeAwareGuidance
from .tangential import TangentialClassifierFreeGuidance
from .weakened import AutoGuidance, PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
from .wrapper import GuidanceRescale, IntervalGuidance
from .zero_star import ClassifierFreeZeroStarGuidance

__all__ = ["GUIDERS", "make_guider"]

GUIDERS: dict[str, type[Guidance]] = {
    "apg": AdaptiveProjectedGuidance,
    "autoguidance": AutoGuidance,
    "cfg": ClassifierFreeGuidance,
    "cfg++": CFGPlusPlusGuidance,
    "cfg-zero": ClassifierFreeZeroStarGuidance,
    "fdg": FrequencyDecoupledGuidance,
    "interval": IntervalGuidance,
    "mambo-g": MagnitudeAwareGuidance,
    "pag": PerturbedAttentionGuidance,
    "rescale": GuidanceRescale,
    "seg": SmoothedEnergyGuidance,
    "slg": SkipLayerGuidance,
    "tcfg": TangentialClassifierFreeGuidance,
}
"""Rules by the names that the command line takes; each can be made from ``guidance_scale`` alone."""


def make_guider(name: str, guidance_scale: float, pipe: Any = None) -> Guidance:
    """The guider that a name of the command line and of the app stands for, at this scale.

    Args:
        name: one of ``GUIDERS``, or a .json file that ``trimtab tune`` wrote.
        guidance_scale: in the rule's range.
        pipe: whose preset APG takes, if its folder or Hub id ends in the name of one.

    Returns:
        The guider, for ``trimtab.guidance.attach``. APG without a preset limits the guidance by its root mean square,
        which suits latents of any size, where a limit on the norm suits one.

    Raises:
        ValueError: an unknown rule, or a scale that it doesn't take.

    Example:
        >>> make_guider("apg", 10.0).guidance_scale
        10.0
    """
    if name.endswith(".json"):
        return AdaptiveProjectedGuidance.from_preset(name, guidance_scale=guidance_scale)
    if name not in GUIDERS:
        raise ValueError(f"`name` is {name!r}; takes one of {', '.join(GUIDERS)}")
    model = Path(str(getattr(pipe, "name_or_path", ""))).name
    if name == "apg" and model in PRESETS:
        return AdaptiveProjectedGuidance.from_preset(model, guidance_scale=guidance_scale)
    options = {"adaptive_projected_guidance_rescale_rms": RESCALE_RMS} if name == "apg" else {}
    return GUIDERS[name](guidance_scale=guidance_scale, **options)
