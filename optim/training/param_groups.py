"""Parameter groups of a model for the training optimizers that treat kinds of weights differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["frugal_param_groups", "lanton_param_groups"]


def frugal_param_groups(
    model: nn.Module, *, full_state: Sequence[str] = ("norm", "embed", "proj_out", "head"), **options: Any
) -> list[dict[str, Any]]:
    """A model's linear weights to be projected, and all its other trained parameters.

    Embeddings, norms and above all the output layer keep the stateful optimizer: under signSGD the output layer suffers
    most (the paper's ablation).

    Args:
        model: any module.
        full_state: linear weights whose name has one of these in it are left to the stateful optimizer too.
        options: entries for the projected group, such as ``density``.

    Returns:
        Two groups of named parameters; one where the other would be empty.

    Raises:
        ValueError: if the model has no trained parameter.

    Example:
        >>> groups = frugal_param_groups(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), density=0.5)
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['0.weight'], ['0.bias', '1.weight', '1.bias']]
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("`model` has no parameter that requires a gradient; takes one that is trained")
    projected = {name for name, _ in trained if name in linear and not any(part in name for part in full_state)}
    groups = [
        {"params": [item for item in trained if item[0] in projected], "projected": True, **options},
        {"params": [item for item in trained if item[0] not in projected], "projected": False},
    ]
    return [group for group in groups if group["params"]]


def lanton_param_groups(
    model: nn.Module, *, sign: Sequence[str] = ("embed", "proj_out", "head"), **options: Any
) -> list[dict[str, Any]]:
    """A model's parameters by the geometry that LANTON gives them.

    Args:
        model: any module.
        sign: matrices whose name has one of these in it, and tables of embeddings, get the kind "sign".
        options: entries for all groups, such as ``weight_decay``.

    Returns:
        Groups of named parameters of kind "spectral" (matrices), "sign" and "rms" (vectors, and tensors of three
        dimensions or more); those that are not empty.

    Raises:
        ValueError: if the model has no trained parameter.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
        >>> [(group["kind"], [name for name, _ in group["params"]]) for group in lanton_param_groups(model)]
        [('spectral', ['1.weight']), ('sign', ['0.weight']), ('rms', ['1.bias'])]
    """
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    kinds: dict[str, list] = {"spectral": [], "sign": [], "rms": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_entry = p.ndim == 2 and (name in tables or any(part in name for part in sign))
            kinds["sign" if by_entry else "spectral" if p.ndim == 2 else "rms"].append((name, p))
    if not any(kinds.values()):
        raise ValueError("`model` has no parameter that requires a gradient; takes one that is trained")
    return [{"params": params, "kind": kind, **options} for kind, params in kinds.items() if params]
