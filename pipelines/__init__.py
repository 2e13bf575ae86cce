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

__all__ = ["FAMILIES", "Family", "GenerationMap", "family_of", *_GUIDED]


def __getattr__(name: str) -> object:
    """Imports a guided pipeline's file on first use (PEP 562)."""
    if name not in _GUIDED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_GUIDED[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_GUIDED})
