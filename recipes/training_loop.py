"""The loop that trains every bundled model: accelerate, a decaying rate, averaged weights, checkpoints that resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from trimtab.optim import AdaptiveBatchSize

from .checkpoints import Progress, load_checkpoint, save_checkpoint, trained_parameters, weights_of
from .curvature import stable_rate

Update = Callable[[Accelerator, nn.Module, Sequence[torch.optim.Optimizer], int], tuple[float, dict[str, float]]]


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
        accumulation: micro-batches of ``batch_size`` whose gradients are averaged in a step.
        mixed_precision: "no", "bf16" or "fp16"; None takes bf16 where the machine has it.
        log_every: steps between two lines of the log.
        curvature: log 2 / lambda_max of the line's batch beside the rate, at the price of a dozen steps a line.
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
    accumulation: int = 1
    mixed_precision: str | None = None
    log_every: int = 50
    curvature: bool = False
    compile: bool = False
    seed: int = 0

    def rate(self, step: float) -> float:
        """Learning rate of ``step``, which counts from 0; between two where a step has more than its micro-batches."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        done = (step / self.num_steps - self.decay_start) / (1.0 - self.decay_start)
        return self.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, done))))


def train(
    module: nn.Module,
    loss_of_step: Callable[[nn.Module, int, int, torch.device], tuple[Tensor, dict[str, Tensor]]] | None,
    settings: TrainingSettings,
    folder: Path,
    *,
    max_seconds: float | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    update: Update | None = None,
    batch: AdaptiveBatchSize | None = None,
    trackers: Sequence[str | GeneralTracker] = (),
    validate: Callable[[int], None] | None = None,
    validate_every: int = 0,
) -> bool:
    """Trains ``module``, from the checkpoint in ``folder`` where there is one.

    What is drawn in a step depends on the seed and the step alone, so an interrupted run goes on as if it had not been.

    Args:
        module: the network; its ``forward`` is what ``loss_of_step`` calls. Ends up with the averaged weights.
        loss_of_step: takes the prepared module, the step, the number of the batch to draw (the step's own in each
            process) and the device; gives the loss and figures to show. None with ``update``.
        settings: see :class:`TrainingSettings`.
        folder: holds ``checkpoint.safetensors`` and ``log.jsonl``; made where missing.
        max_seconds: stop after this time with a checkpoint; None runs to the end.
        optimizers: in the place of AdamW over all parameters; their rate is set at every step, to the settings' rate
            times the parameter group's ``rate_factor`` where it has one.
        update: in the place of the loss's gradient and the optimizers' steps, for methods that draw at other weights
            than the present ones, or go several steps from one draw. Takes the accelerator, the prepared module, the
            prepared optimizers and the step; changes the weights, and gives the loss and figures to show.
        batch: lets the micro-batches of a step grow; the run then ends after as many micro-batches, and so samples, as
            without it, and the rate falls with them.
        trackers: of accelerate, which get every line of the log.
        validate: called with the step while ``module`` has the averaged weights, in the main process, at the end too.
        validate_every: steps between two calls; 0 calls it at the end alone.

    Returns:
        Whether all steps are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision or ("bf16" if has_bf16() else "no"),
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    accelerator.init_trackers(
        folder.name, {name: value for name, value in asdict(settings).items() if value is not None}
    )
    optimizers = list(optimizers or [adamw(module.named_parameters(), settings)])
    ema = EMAModel(trained_parameters(module).values(), decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    at = Progress(batch=batch)
    load_checkpoint(folder, module.to(accelerator.device), optimizers, ema, at)
    prepared, *optimizers = accelerator.prepare(module, *optimizers)
    if settings.compile:
        prepared.compile(dynamic=False)
    if batch is not None:
        batch.watch(trained_parameters(module).values())
    accelerator.gradient_accumulation_steps = batch.accumulation_steps if batch else settings.accumulation
    started = saved = time.monotonic()
    total = settings.num_steps * settings.accumulation
    progress = tqdm(total=total, initial=at.drawn, desc=folder.name, disable=not accelerator.is_main_process)
    module.train()
    while at.drawn < total:
        drawn = at.drawn
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = settings.rate(at.drawn / settings.accumulation) * group.get("rate_factor", 1.0)
        if update is not None:
            loss, figures = update(accelerator, prepared, optimizers, at.step)
            at.step, at.drawn = at.step + 1, at.drawn + settings.accumulation
        else:
            loss, figures = _gradients(accelerator, prepared, loss_of_step, at)
            accelerator.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        ema.step(trained_parameters(module).values())
        progress.update(at.drawn - drawn)
        if at.step % settings.log_every == 0 or at.drawn >= total:
            rate = settings.rate(drawn / settings.accumulation)
            row = {
                "step": at.step,
                "rate": rate,
                "seconds": round(time.monotonic() - started, 1),
                "loss": loss,
                **figures,
            }
            if settings.curvature:
                draw = drawn * accelerator.num_processes + accelerator.process_index
                device, compiled = accelerator.device, settings.compile
                row["stable_rate"] = stable_rate(module, loss_of_step, at.step - 1, draw, device, compiled=compiled)
            if batch is not None:
                row |= {"batch_size": batch.size, "samples": at.drawn * settings.batch_size * accelerator.num_processes}
            _log(folder, row, progress, accelerator)
        now = time.monotonic()
        out_of_time = _any(accelerator, max_seconds is not None and now - started > max_seconds)
        if out_of_time or at.drawn >= total or now - saved > settings.checkpoint_seconds:
            if accelerator.is_main_process:
                save_checkpoint(folder, module, optimizers, ema, at, settings)
            saved = now
        due = validate_every and at.step % validate_every == 0 and at.drawn < total
        if validate and due and accelerator.is_main_process:
            _validate(module, ema, validate, at.step)
        if out_of_time:
            break
    progress.close()
    ema.copy_to(trained_parameters(module).values())
    module.eval()
    if validate and accelerator.is_main_process and at.drawn >= total:
        validate(at.step)
    accelerator.end_training()
    return at.drawn >= total


def _gradients(
    accelerator: Accelerator, prepared: nn.Module, loss_of_step: Callable, at: Progress
) -> tuple[float, dict[str, float]]:
    """Gradients of a step's micro-batches; gives the means of their losses and figures."""
    losses, figures, synchronized = [], [], False
    while not synchronized:
        draw = at.drawn * accelerator.num_processes + accelerator.process_index
        with accelerator.accumulate(prepared):
            loss, shown = loss_of_step(prepared, at.step, draw, accelerator.device)
            accelerator.backward(loss)
            synchronized = accelerator.sync_gradients
            if at.batch is not None:
                at.batch.accumulate(accelerator)
        at.drawn += 1
        losses.append(loss.detach())
        figures.append({name: value.detach() for name, value in shown.items()})
    at.step += 1
    means = {name: float(torch.stack([item[name] for item in figures]).float().mean()) for name in figures[0]}
    return float(torch.stack(losses).mean()), means


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it holds in any process: all are to stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)


def _validate(module: nn.Module, ema: EMAModel, validate: Callable[[int], None], step: int) -> None:
    parameters = list(trained_parameters(module).values())
    ema.store(parameters)
    ema.copy_to(parameters)
    module.eval()
    validate(step)
    ema.restore(parameters)
    module.train()


def averaged_weights(module: nn.Module, folder: Path) -> int:
    """Loads the averaged weights of the checkpoint in ``folder`` into ``module``; gives the step they are of.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    tensors = load_file(folder / "checkpoint.safetensors")
    module.load_state_dict(weights_of(tensors))
    for name, parameter in trained_parameters(module).items():
        parameter.data.copy_(tensors[f"ema.{name}"])
    return int(json.loads((folder / "checkpoint.json").read_text())["step"])


def write_finished(module: nn.Module, settings: TrainingSettings, folder: Path) -> None:
    """Writes ``module`` to ``folder`` as the checkpoint of a run that is done, its weights as the averaged ones."""
    folder.mkdir(parents=True, exist_ok=True)
    at = Progress(settings.num_steps, settings.num_steps * settings.accumulation)
    save_checkpoint(folder, module, (), EMAModel(trained_parameters(module).values()), at, settings)


def has_bf16() -> bool:
    """Whether the device computes in bfloat16 itself; a processor may emulate it, many times slower."""
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


def _log(folder: Path, row: dict[str, float], progress: tqdm, accelerator: Accelerator) -> None:
    progress.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name not in ("step", "seconds")})
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
    if accelerator.is_main_process:
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
