"""Checkpoints of the recipes' loop: a model, its averaged weights and its optimizers as safetensors, whole or not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.optim import AdaptiveBatchSize

__all__ = ["Progress", "load_checkpoint", "save_checkpoint", "trained_parameters", "weights_of"]


@dataclass
class Progress:
    """Where a run stands: optimizer steps, micro-batches drawn, and the batch size's controller where it has one."""

    step: int = 0
    drawn: int = 0
    batch: AdaptiveBatchSize | None = None


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad`` by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's entries of a checkpoint."""
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


def save_checkpoint(
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    ema: EMAModel,
    at: Progress,
    settings: Any,
) -> None:
    """Writes ``checkpoint.safetensors``, and ``checkpoint.json`` with the settings (a dataclass) for people to read."""
    tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in zip(trained_parameters(module), ema.shadow_params, strict=True)}
    groups, plain = [], {}
    for number, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        for index, state in saved["state"].items():
            prefix = f"optimizer.{number}.{index}"
            tensors |= {f"{prefix}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
            others = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            plain |= {f"{prefix}.{key}": _packed(value, f"{prefix}.{key}", tensors) for key, value in others.items()}
        # what an optimizer counts in its groups
        groups.append([{k: v for k, v in group.items() if type(v) is int} for group in saved["param_groups"]])
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    rest = {"drawn": at.drawn, "groups": groups, "states": plain, "batch": at.batch.state_dict() if at.batch else None}
    metadata = {"step": str(at.step), "progress": json.dumps(rest)}
    _replace(folder / "checkpoint.safetensors", lambda path: save_file(tensors, path, metadata))
    text = json.dumps({"step": at.step, "settings": asdict(settings)}, indent=2)
    _replace(folder / "checkpoint.json", lambda path: path.write_text(text))


def load_checkpoint(
    folder: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: EMAModel, at: Progress
) -> None:
    """Loads what :func:`save_checkpoint` wrote into its arguments; does nothing where there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    at.step = int(metadata["step"])
    rest = json.loads(metadata.get("progress", "{}"))
    at.drawn = rest.get("drawn", at.step)
    if at.batch is not None and rest.get("batch"):
        at.batch.load_state_dict(rest["batch"])
    module.load_state_dict(weights_of(tensors))
    ema.shadow_params = [
        tensors[f"ema.{name}"].to(p.device)
        for name, p in zip(trained_parameters(module), ema.shadow_params, strict=True)
    ]
    ema.optimization_step = at.step
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    plain = {name: _unpacked(value, tensors) for name, value in rest.get("states", {}).items()}
    for name, value in (tensors | plain).items():
        if name.startswith("optimizer.") and name.count(".") == 3:
            _, number, index, key = name.split(".")
            states[int(number)].setdefault(int(index), {})[key] = value
    counts = rest.get("groups") or [[{} for _ in optimizer.param_groups] for optimizer in optimizers]
    for optimizer, state, counted in zip(optimizers, states, counts, strict=True):
        present = optimizer.state_dict()  # may hold more than torch's two entries
        groups = [group | own for group, own in zip(present["param_groups"], counted, strict=True)]
        optimizer.load_state_dict({**present, "state": state, "param_groups": groups})


def _packed(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """What JSON can hold of a state: its tensors go to ``tensors``, and their names stand in their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        return [_packed(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    return value


def _unpacked(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    return [_unpacked(item, tensors) for item in value] if isinstance(value, list) else value


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
