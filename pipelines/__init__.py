"""Stock Diffusers pipelines as functions of their noise, and what is done to such a function."""

import importlib

from .families import FAMILIES, Family, family_of
from .generation_map import GenerationMap

# Each is a custom pipeline in a file of its own; loaded when first used, with the stock class that it is made of.
_GUIDED = {
    "GuidedFluxPipeline": "guided_flux",
    "GuidedPixArtSigmaPipeline": "guided_pixart_sigma",
    "GuidedQwenImagePipeline": "guided_qwen_image",
    "GuidedSanaPipeline": "guided_sana",
    "GuidedStableDiffusion3Pipeline": "guided_stable_diffusion_3",
    "GuidedStableDiffusionPipeline": "guided_stable_diffusion",
    "GuidedStableDiffusionXLPipeline": "guided_stable_diffusion_xl",
    "GuidedWanPipeline": "guided_wan",
}

_FLOWOPT = {
    "FlowOptAuraFlowPipeline": "flowopt_aura_flow",
    "FlowOptFlux2KleinPipeline": "flowopt_flux_2_klein",
    "FlowOptFlux2Pipeline": "flowopt_flux_2",
    "FlowOptFluxPipeline": "flowopt_flux",
    "FlowOptLumina2Pipeline": "flowopt_lumina_2",
    "FlowOptQwenImagePipeline": "flowopt_qwen_image",
    "FlowOptSanaPipeline": "flowopt_sana",
    "FlowOptStableDiffusion3Pipeline": "flowopt_stable_diffusion_3",
    "FlowOptStableDiffusionPipeline": "flowopt_stable_diffusion",
    "FlowOptStableDiffusionXLPipeline": "flowopt_stable_diffusion_xl",
    "FlowOptZImagePipeline": "flowopt_z_image",
}
_NOISE_OPTIMIZATION = {
    "NoiseOptimizationFluxPipeline": "noise_optimization_flux",
    "NoiseOptimizationPixArtAlphaPipeline": "noise_optimization_pixart_alpha",
    "NoiseOptimizationPixArtSigmaPipeline": "noise_optimization_pixart_sigma",
    "NoiseOptimizationSanaPipeline": "noise_optimization_sana",
    "NoiseOptimizationSanaSprintPipeline": "noise_optimization_sana_sprint",
    "NoiseOptimizationStableDiffusionPipeline": "noise_optimization_stable_diffusion",
    "NoiseOptimizationStableDiffusion3Pipeline": "noise_optimization_stable_diffusion_3",
    "NoiseOptimizationStableDiffusionXLPipeline": "noise_optimization_stable_diffusion_xl",
    "NoiseOptimizationZImagePipeline": "noise_optimization_z_image",
}
_LAZY = {
    **_GUIDED,
    **_FLOWOPT,
    **_NOISE_OPTIMIZATION,
    "EditPipeline": "editing",
    "FlowOptPipeline": "flowopt",
    "NoiseOptimizationPipeline": "noise_optimization",
    "NoisePosterior": "noise_posterior",
    "PatternedSensor": "sensors",
    "RestorationPipeline": "restoration",
    "Sensor": "sensors",
    "ShiftedSensor": "sensors",
}

__all__ = ["FAMILIES", "Family", "GenerationMap", "family_of", *_LAZY]


def __getattr__(name: str) -> object:
    """Imports a pipeline's file on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
