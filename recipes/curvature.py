"""The learning rate that the loss's curvature allows, beside the one that a run uses."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from trimtab.optim import hessian_operator, top_eigenpairs

from .checkpoints import trained_parameters

__all__ = ["add_curvature_argument", "stable_rate", "with_curvature"]

PRODUCTS = 12


def stable_rate(
    module: nn.Module, loss_of_step: Callable, step: int, draw: int, device: torch.device, *, compiled: bool = False
) -> float:
    """2 / lambda_max of the loss of one batch: beyond it plain gradient descent diverges along one direction.

    Optimizers that scale coordinates, as Adam does, can go beyond it; what falls over a run gets sharper.

    Args:
        module: the network, whose weights and mode stay as they are.
        loss_of_step: as `train`'s; gives the same loss for the same step and draw.
        step: of the training.
        draw: the batch's number.
        device: where to.
        compiled: take differences of gradients: what `torch.compile` makes has no second derivative.

    Returns:
        The rate; infinite where no curvature is positive.
    """
    parameters = list(trained_parameters(module).values())
    operator = hessian_operator(
        lambda: loss_of_step(module, step, draw, device)[0],
        parameters,
        method="finite_difference" if compiled else "double_backward",
        keep_graph=False,
    )
    largest = float(top_eigenpairs(operator, 1, max_iter=min(PRODUCTS, operator.size), tol=1e-2).values[0])
    return 2 / largest if largest > 0 else math.inf


def add_curvature_argument(parser: argparse.ArgumentParser, *, of: str = "the loss") -> None:
    """Adds ``--curvature`` to a recipe's arguments."""
    parser.add_argument(
        "--curvature",
        action="store_true",
        help=f"log 2 / lambda_max of {of} beside the rate, at the price of a dozen steps a line of the log",
    )


def with_curvature(preset: Any, *names: str) -> Any:
    """A preset whose training settings log 2 / lambda_max.

    Args:
        preset: a dataclass with training settings among its fields.
        names: of those; none are all of them.

    Example:
        >>> from trimtab.recipes.distil import PRESETS
        >>> with_curvature(PRESETS["cpu"]).training.curvature
        True
    """
    found = {field.name: getattr(preset, field.name) for field in fields(preset)}
    chosen = {name: value for name, value in found.items() if hasattr(value, "curvature") and name in (names or found)}
    return replace(preset, **{name: replace(value, curvature=True) for name, value in chosen.items()})
