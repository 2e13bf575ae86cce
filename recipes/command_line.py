"""What the command lines of finetuning recipes share: arguments of a run that resumes, and what is said at its end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .training_loop import TrainingSettings

__all__ = ["add_run_arguments", "report_end", "training_settings"]


def add_run_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds arguments of the run.

    Args:
        parser: of the recipe.
        defaults: of ``warmup_steps``, ``steps``, ``ema_decay`` and ``log_every``.
    """
    add = parser.add_argument
    add("--warmup-steps", type=int)
    add("--steps", type=int)
    add("--rank", type=int, default=16)
    add("--ema-decay", type=float, help="0 keeps the last weights")
    add("--tracker", action="append", default=[], help="of accelerate, such as tensorboard or wandb")
    add("--log-every", type=int)
    add("--checkpoint-seconds", type=float, default=120.0)
    add("--max-seconds", type=float, help="stop with a checkpoint after this time")
    add("--seed", type=int, default=0)
    parser.set_defaults(**defaults)


def training_settings(options: argparse.Namespace, learning_rate: float, **others: Any) -> TrainingSettings:
    """The settings that the arguments say, with further ones of the recipe's own."""
    return TrainingSettings(
        options.steps,
        options.batch_size,
        learning_rate,
        warmup_steps=options.warmup_steps,
        ema_decay=options.ema_decay,
        checkpoint_seconds=options.checkpoint_seconds,
        accumulation=options.accumulation,
        mixed_precision=options.mixed_precision,
        log_every=options.log_every,
        seed=options.seed,
        **others,
    )


def report_end(done: bool, options: argparse.Namespace, write: Callable[[], Path]) -> None:
    """Writes and names the result of a run that came to its end, or says how it goes on."""
    if done:
        print(f"written to {write()}")
    else:
        print(f"stopped after {options.max_seconds:g} s; run the same command to go on")
