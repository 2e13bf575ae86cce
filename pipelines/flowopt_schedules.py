"""The deterministic sampler that a pipeline is edited with, and the scheduler that inverts it."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trimtab.schedulers import FlowMatchUniInvScheduler

__all__ = ["inverse_of", "sampler_of"]

# Parts of the names of schedulers that draw noise at each step.
_NOISY_NAMES = (
    "Ancestral",
    "SDE",
    "Sde",
    "LCM",
    "TCD",
    "DDPM",
    "SASolver",
    "UnCLIP",
    "RePaint",
    "KarrasVe",
    "CosineDPM",
)
_FLOW_PREDICTIONS = ("flow_prediction", "flow")


def sampler_of(scheduler: Any) -> Any:
    """The deterministic sampler for a pipeline with this scheduler: Euler's method for a flow, else DDIM.

    Args:
        scheduler: the pipeline's.

    Returns:
        A new `FlowMatchEulerDiscreteScheduler` or `DDIMScheduler` with the same noise schedule. Other deterministic
        schedulers (DPM-Solver, UniPC, PNDM, Heun) are replaced by it: a sampler of one step at a time can be started
        and stopped at any step and has a known inverse.

    Raises:
        ValueError: the scheduler adds noise while it samples.

    Example:
        >>> type(sampler_of(DDIMScheduler())).__name__
        'DDIMScheduler'
    """
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("stochastic_sampling", False) or str(config.get("algorithm_type", "")).startswith("sde"):
        option = "stochastic_sampling" if config.get("stochastic_sampling", False) else "algorithm_type"
        raise ValueError(
            f"`scheduler` is a {name} with `{option}` {config[option]!r}, which adds noise while it samples; takes a "
            "deterministic one"
        )
    if any(part in name for part in _NOISY_NAMES):
        raise ValueError(f"`scheduler` is a {name}, which adds noise while it samples; takes a deterministic one")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not getattr(scheduler, "inverse", False):
        return type(scheduler).from_config(config)
    if name.startswith("FlowMatch"):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if config.get("prediction_type") in _FLOW_PREDICTIONS or config.get("use_flow_sigmas", False):
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config.get("num_train_timesteps", 1000), shift=config.get("flow_shift") or 1.0
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"`scheduler` is a {name}; takes one of a flow or of a variance-preserving diffusion")
    spacing = config.get("timestep_spacing", "leading")
    return DDIMScheduler.from_config(
        config,
        clip_sample=False,
        thresholding=False,
        timestep_spacing=spacing if spacing in ("leading", "trailing") else "leading",
    )


def inverse_of(sampler: Any) -> Any:
    """The scheduler that takes a picture's latents up a sampler's schedule.

    Args:
        sampler: what `sampler_of` gave.

    Returns:
        UniInv for a flow, `DDIMInverseScheduler` for DDIM.
    """
    if isinstance(sampler, DDIMScheduler):
        known = inspect.signature(DDIMInverseScheduler.__init__).parameters  # it warns of others
        return DDIMInverseScheduler.from_config({k: v for k, v in sampler.config.items() if k in known})
    return FlowMatchUniInvScheduler.from_config(sampler.config)
