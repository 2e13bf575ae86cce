"""Settings of noise optimization by name: how the noise moves, and how a model is to be called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.guidance.tuned_preset import TunedPreset

from .noise_sphere import SphereMomentum

__all__ = ["NOISE_PRESETS", "NoisePreset", "noise_preset"]


@dataclass(frozen=True)
class NoisePreset:
    """One entry.

    Attributes:
        optimizer: settings of `GradientAscent` and its torch optimizer.
        call: arguments of the stock call; those that a call gives itself hold.
    """

    optimizer: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)


_SPHERE = {"num_starts": 8, "optimizer": SphereMomentum, "lr": 0.015, "momentum": 0.9}


def _paper(lr: float = 5.0) -> dict[str, Any]:
    """SGD with Nesterov's momentum on the clipped gradient: ReNO (arXiv 2406.04312), section 4 and its code."""
    return {
        "optimizer": torch.optim.SGD,
        "lr": lr,
        "momentum": 0.9,
        "nesterov": True,
        "max_grad_norm": 0.1,
        "regularization_weight": 0.01,
    }


_ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}
NOISE_PRESETS: dict[str, NoisePreset] = {
    # The paper's: steps on the sphere climb further, and past 10 iterations the judge finds fewer pictures right.
    "default": NoisePreset(_paper()),
    "sphere": NoisePreset(_SPHERE),
    "paper": NoisePreset(_paper()),
    # The paper's models as its code calls them. SDXL-Turbo has an Euler-ancestral scheduler with trailing steps,
    # Hyper-SDXL an LCM scheduler and PixArt-DMD its own DDPM one.
    "paper-sd-turbo": NoisePreset(_paper(), _ONE_STEP | {"height": 512, "width": 512}),
    "paper-sdxl-turbo": NoisePreset(_paper(), _ONE_STEP | {"height": 512, "width": 512}),
    "paper-hyper-sdxl": NoisePreset(_paper(10.0), {"timesteps": [800], "guidance_scale": 0.0}),
    "paper-pixart-dmd": NoisePreset(
        _paper(), {"timesteps": [400], "num_inference_steps": 1, "guidance_scale": 1.0, "height": 512, "width": 512}
    ),
    "paper-flux-schnell": NoisePreset(_paper(), _ONE_STEP | {"height": 512, "width": 512, "max_sequence_length": 256}),
    # Few-step models that came later, called as their authors say.
    "sd3.5-large-turbo": NoisePreset(_paper(), {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "flux-schnell": NoisePreset(
        _paper(), {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}
    ),
    "sana-sprint": NoisePreset(_paper(), {"num_inference_steps": 2, "guidance_scale": 4.5}),
    "z-image-turbo": NoisePreset(_paper(), {"num_inference_steps": 9, "guidance_scale": 0.0}),
}


def noise_preset(name: str | None) -> NoisePreset:
    """The settings of a name, of a .json file that ``trimtab tune`` wrote, or the default ones.

    Args:
        name: a key of ``NOISE_PRESETS``, a path that ends in .json, or None. A file's settings are over "sphere".

    Raises:
        ValueError: for an unknown name, or a file that is no preset.
        FileNotFoundError: if there is no such file.
    """
    if name is None:
        return NOISE_PRESETS["default"]
    if str(name).endswith(".json"):
        return NoisePreset({**NOISE_PRESETS["sphere"].optimizer, **TunedPreset.load(name).noise})
    if name not in NOISE_PRESETS:
        raise ValueError(f"`preset` is {name!r}; takes one of {', '.join(NOISE_PRESETS)}, or a .json file")
    return NOISE_PRESETS[name]
