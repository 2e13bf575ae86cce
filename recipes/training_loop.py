"""The loop that trains every bundled model: accelerate, a decaying rate, averaged weights, checkpoints that resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train.

    Attributes:
        num_steps: optimizer steps in all.
        batch_size: examples a step.
        learning_rate: of AdamW, reached after ``warmup_steps``.
        decay_start: fraction of the steps after which the rate falls, as half a cosine, to zero.
        weight_decay: of AdamW, on matrices and kernels only.
        ema_decay: of the averaged weights that are kept in the end.
        checkpoint_seconds: time between two checkpoints.
        compile: whether the model runs through ``torch.compile``.
        seed: of everything random.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    decay_start: float = 0.5
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    checkpoint_seconds: float = 120.0
    compile: bool = False
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, which counts from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        done = (step / self.num_steps - self.decay_start) / (1.0 - self.decay_start)
        return self.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, done))))


def train(
    module: nn.Module,
    loss_of_step: Callable[[nn.Module, int, int, torch.device], tuple[Tensor, dict[str, Tensor]]],
    settings: TrainingSettings,
    folder: Path,
    *,
    max_seconds: float | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
) -> bool:
    """Trains ``module``, from the checkpoint in ``folder`` where there is one.

    What is drawn in a step depends on the seed and the step alone, so an interrupted run goes on as if it had not been.

    Args:
        module: the network; its ``forward`` is what ``loss_of_step`` calls. Ends up with the averaged weights.
        loss_of_step: takes the prepared module, the step, the number of the batch to draw (the step's own in each
            process) and the device; gives the loss and figures to show.
        settings: see :class:`TrainingSettings`.
        folder: holds ``checkpoint.safetensors`` and ``log.jsonl``; made where missing.
        max_seconds: stop after this time with a checkpoint; None runs to the end.
        optimizers: in the place of AdamW over all parameters; their rate is set at every step, to the settings' rate
            times the parameter group's ``rate_factor`` where it has one.

    Returns:
        Whether all steps are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mixed_precision = "bf16" if _has_bf16() else "no"
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    optimizers = list(optimizers or [adamw(module.named_parameters(), settings)])
    ema = EMAModel(_trained(module).values(), decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    step = _load(folder, module.to(accelerator.device), optimizers, ema)
    prepared, *optimizers = accelerator.prepare(module, *optimizers)
    if settings.compile:
        prepared.compile(dynamic=False)
    started = saved = time.monotonic()
    progress = tqdm(total=settings.num_steps, initial=step, desc=folder.name, disable=not accelerator.is_main_process)
    module.train()
    while step < settings.num_steps:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = settings.rate(step) * group.get("rate_factor", 1.0)
        draw = step * accelerator.num_processes + accelerator.process_index
        loss, figures = loss_of_step(prepared, step, draw, accelerator.device)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.step(_trained(module).values())
        step += 1
        progress.update()
        if step % 50 == 0:
            _log(folder, step, settings.rate(step - 1), loss, figures, time.monotonic() - started, progress)
        now = time.monotonic()
        out_of_time = max_seconds is not None and now - started > max_seconds
        if out_of_time or step == settings.num_steps or now - saved > settings.checkpoint_seconds:
            if accelerator.is_main_process:
                _save(folder, module, optimizers, ema, step, settings)
            saved = now
        if out_of_time:
            break
    progress.close()
    ema.copy_to(_trained(module).values())
    module.eval()
    return step >= settings.num_steps


def averaged_weights(module: nn.Module, folder: Path) -> int:
    """Loads the averaged weights of the checkpoint in ``folder`` into ``module``; gives the step they are of.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    tensors = load_file(folder / "checkpoint.safetensors")
    module.load_state_dict(_weights(tensors))
    for name, parameter in _trained(module).items():
        parameter.data.copy_(tensors[f"ema.{name}"])
    return int(json.loads((folder / "checkpoint.json").read_text())["step"])


def write_finished(module: nn.Module, settings: TrainingSettings, folder: Path) -> None:
    """Writes ``module`` to ``folder`` as the checkpoint of a run that is done, its weights as the averaged ones."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, module, (), EMAModel(_trained(module).values()), settings.num_steps, settings)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "bf16" in torch.backends.cpu.get_cpu_capability().lower() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over named parameters; vectors and scalars do not decay."""
    trained = [p for _, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def _log(
    folder: Path, step: int, rate: float, loss: Tensor, figures: dict[str, Tensor], seconds: float, progress: tqdm
) -> None:
    row = {"step": step, "rate": rate, "seconds": round(seconds, 1), "loss": float(loss.detach())}
    row |= {name: float(value) for name, value in figures.items()}
    progress.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name not in ("step", "seconds")})
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _save(
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    ema: EMAModel,
    step: int,
    settings: TrainingSettings,
) -> None:
    tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in zip(_trained(module), ema.shadow_params, strict=True)}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            prefix = f"optimizer.{number}.{index}"
            tensors |= {f"{prefix}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    _replace(folder / "checkpoint.safetensors", lambda path: save_file(tensors, path, {"step": str(step)}))
    text = json.dumps({"step": step, "settings": asdict(settings)}, indent=2)
    _replace(folder / "checkpoint.json", lambda path: path.write_text(text))


def _load(folder: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: EMAModel) -> int:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    module.load_state_dict(_weights(tensors))
    step = int(json.loads((folder / "checkpoint.json").read_text())["step"])
    ema.shadow_params = [
        tensors[f"ema.{name}"].to(p.device) for name, p in zip(_trained(module), ema.shadow_params, strict=True)
    ]
    ema.optimization_step = step
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, index, key = name.split(".")
            states[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
