"""Optimizers of the recipes by name: torch's, those of ``trimtab.optim`` and pytorch-optimizer's preconditioners."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from trimtab.optim import AdaGradNorm, DCTAdamW, Frugal, Lanton, Trion, frugal_param_groups, lanton_param_groups
from trimtab.optim.training.biases import PRECONDITIONERS, preconditioned_optimizer

from .training_loop import TrainingSettings, adamw

__all__ = ["OPTIMIZERS", "build_optimizers"]

OPTIMIZERS = ("adamw", "muon", "frugal", "dct_adamw", "trion", "lanton", "adagrad_norm", *PRECONDITIONERS)
"""Names that :func:`build_optimizers` takes, beside that of any class of ``torch.optim`` in any case."""

_NOT_MATRICES = ("embed", "proj_out", "head")


def build_optimizers(
    name: str, module: nn.Module, settings: TrainingSettings, **options: Any
) -> list[torch.optim.Optimizer]:
    """Optimizers over what a module trains, to be given to :func:`train`.

    Muon and Trion take the matrices, without embeddings and output layers, and leave the rest to AdamW. FRUGAL and DCT
    save state where whole matrices are trained; for LoRA they are of no use.

    Args:
        name: one of :data:`OPTIMIZERS`, or a class of ``torch.optim`` such as "sgd".
        module: its parameters with ``requires_grad`` are trained.
        settings: gives ``learning_rate`` and ``weight_decay``, which vectors and scalars do not have.
        options: further arguments of the optimizer.

    Raises:
        ValueError: another name, or nothing to train.
        TypeError: an option that the optimizer does not know.
    """
    named = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("`module` has no parameter that requires a gradient; takes one that is trained")
    rate, decay = settings.learning_rate, settings.weight_decay
    if name == "adamw" and not options:
        return [adamw(named, settings)]
    if name in ("muon", "trion"):
        matrices = [(key, p) for key, p in named if p.ndim == 2 and not any(part in key for part in _NOT_MATRICES)]
        rest = [item for item in named if all(item[0] != key for key, _ in matrices)]
        if name == "muon":
            options.setdefault("adjust_lr_fn", "match_rms_adamw")
        kind = torch.optim.Muon if name == "muon" else Trion
        chosen = [kind([p for _, p in matrices], lr=rate, weight_decay=decay, **options)] if matrices else []
        return chosen + ([adamw(rest, settings)] if rest else [])
    if name == "frugal":
        return [Frugal(frugal_param_groups(module), lr=rate, weight_decay=decay, **options)]
    if name == "lanton":
        return [Lanton(lanton_param_groups(module), lr=rate, weight_decay=decay, **options)]
    groups = _groups(named, decay)
    if name == "dct_adamw":
        return [DCTAdamW(groups, lr=rate, **options)]
    if name == "adagrad_norm":
        return [AdaGradNorm(groups, lr=rate, **options)]
    if name in PRECONDITIONERS:
        return [preconditioned_optimizer(name, groups, rate, **options)]
    return [_torch_class(name)(groups, lr=rate, **options)]


def _groups(named: list[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _torch_class(name: str) -> type[torch.optim.Optimizer]:
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() not in classes:
        known = sorted({*OPTIMIZERS, *classes})
        raise ValueError(f"`optimizer` is {name!r}; takes {', '.join(known)}")
    return classes[name.lower()]
