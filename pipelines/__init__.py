"""Stock Diffusers pipelines as functions of their noise, and what is done to such a function."""

from .families import FAMILIES, Family, family_of
from .generation_map import GenerationMap

__all__ = ["FAMILIES", "Family", "GenerationMap", "family_of"]
