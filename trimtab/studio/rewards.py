"""Rewards in memory, shared by the runs of all visitors: they are frozen and hold nothing of anybody's."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["loaded_reward", "with_few_steps"]


def loaded_reward(name: str, device: Any) -> Any:
    """A reward by its name in ``trimtab.rewards.REWARDS``, on a device.

    Raises:
        ValueError: it is not on this machine and cannot be fetched.
    """
    import torch

    return _loaded(name, torch.device(device).type)


@functools.lru_cache(maxsize=4)
def _loaded(name: str, device: str) -> Any:
    from trimtab.rewards import load_reward

    try:
        return load_reward(name, device=device)
    except OSError as error:
        raise ValueError(f"The reward {name} is not on this machine and could not be fetched.") from error


@functools.lru_cache(maxsize=1)
def with_few_steps(pipe: Any) -> Any:
    """The bundled model's pipeline with its distilled transformer."""
    from trimtab.commands import few_steps

    return few_steps.with_few_steps(pipe)
