"""The bundled model in four network evaluations: ``python -m trimtab.recipes.distil``. Run again after an interruption.

The student starts as the model itself and learns, for each of four equal steps of the noise level, the straight line to
where three guided Euler steps of the frozen model lead: classifier-free guidance and the number of steps are distilled
at once.

Sources: progressive distillation (Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
arXiv:2202.00512, section 3: the target is what makes one student step end where the teacher's steps end), of the guided
model ("On Distillation of Guided Diffusion Models", Meng et al., arXiv:2210.03142, section 3), in one round instead of
several. The states are those that the student itself visits from pure noise (Ross et al., "A Reduction of Imitation
Learning and Structured Prediction to No-Regret Online Learning", arXiv:1011.0686), so that it learns to mend its own
errors and no data but captions are needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.assets import FEW_STEPS, asset_path

from .assemble import save_part
from .curvature import add_curvature_argument, with_curvature
from .emoji_scenes import CATEGORIES, sample_facts, write_caption
from .optimizers import OPTIMIZERS, build_optimizers
from .text import MAX_LENGTH, build_tokenizer
from .train_transformer import FlowMatchingLoss, muon_and_adamw, t5_ids_of
from .training_loop import TrainingSettings, averaged_weights, train

__all__ = ["PRESETS", "SUBFOLDER", "Distillation", "StraightStep", "distil", "main", "teacher_end"]

SUBFOLDER = FEW_STEPS
NUM_CAPTIONS = 20_000


@dataclass(frozen=True)
class Distillation:
    """What is distilled, and how long.

    Attributes:
        training: its ``batch_size`` counts states, ``num_steps`` of them from each noise.
        num_steps: of the student: noise levels 1, 1 - 1/n, ..., 1/n.
        teacher_steps: guided Euler steps of the teacher for each of the student's.
        guidance_scale: the teacher's.
    """

    training: TrainingSettings
    num_steps: int = 4
    teacher_steps: int = 3
    guidance_scale: float = 3.0


PRESETS = {
    "cpu": Distillation(
        TrainingSettings(1000, 128, 5e-4, warmup_steps=30, decay_start=0.2, ema_decay=0.99, compile=True)
    ),
    "gpu": Distillation(
        TrainingSettings(6000, 512, 5e-4, warmup_steps=100, decay_start=0.3, ema_decay=0.998, compile=True),
        teacher_steps=5,
    ),
}


class StraightStep(nn.Module):
    """The student: its velocity, or how far that is from the target's, (B,)."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents: Tensor, sigmas: Tensor, features: Tensor, pooled: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and noise levels (B,); its squared error given a target."""
        velocity = velocity_of(self.transformer, latents, sigmas, features, pooled)
        return velocity if target is None else (velocity.float() - target).square().mean((1, 2, 3))


def velocity_of(transformer: nn.Module, latents: Tensor, sigmas: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
    """A transformer's prediction (B, C, H, W) at noise levels (B,) in [0, 1]."""
    output = transformer(
        hidden_states=latents,
        timestep=sigmas * 1000.0,
        encoder_hidden_states=features,
        pooled_projections=pooled,
        return_dict=False,
    )
    return output[0]


@torch.no_grad()
def teacher_end(
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    latents: Tensor,
    sigmas: Tensor,
    length: float,
    *,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Where guided Euler steps of equal length lead.

    Args:
        velocity: unconditional and conditional velocities (B, ...) at latents (B, ...) and noise levels (B,).
        latents: (B, ...), float32.
        sigmas: noise levels (B,) that the latents are at.
        length: noise level to go down by.
        num_steps: Euler steps on the way.
        guidance_scale: w in u + w (c - u).

    Returns:
        Latents (B, ...) at ``sigmas - length``.
    """
    step = length / num_steps
    for index in range(num_steps):
        unconditional, conditional = velocity(latents, sigmas - index * step)
        guided = unconditional.float() + guidance_scale * (conditional.float() - unconditional.float())
        latents = latents - step * guided
    return latents


def distil(
    module: FlowMatchingLoss,
    settings: Distillation,
    folder: Path,
    *,
    max_seconds: float | None = None,
    optimizer: str | None = None,
) -> tuple[bool, SD3Transformer2DModel]:
    """Trains a copy of a model's transformer.

    Args:
        module: the teacher with its text encoders; frozen, and its transformer in bfloat16 where the settings compile.
        settings: see :class:`Distillation`.
        folder: of the checkpoint.
        max_seconds: stop after this time with a checkpoint; None runs to the end.
        optimizer: a name that :func:`build_optimizers` takes; None is :func:`muon_and_adamw`.

    Returns:
        Whether all steps are done, and the student with its averaged weights.
    """
    training, steps = settings.training, settings.num_steps
    student = SD3Transformer2DModel.from_config(module.transformer.config)
    student.load_state_dict(module.transformer.state_dict())
    straight = StraightStep(student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = module.eval().requires_grad_(False).to(device)
    teacher = module.transformer.to(torch.bfloat16) if training.compile else module.transformer
    if training.compile:
        teacher.compile(dynamic=False)
    ids = _caption_ids(training.seed)
    empty = build_tokenizer()("", padding="max_length", return_tensors="pt").input_ids
    count = training.batch_size // steps
    levels = torch.arange(steps, 0, -1, device=device) / steps
    sigmas = levels.repeat_interleave(count)

    def loss_of_step(prepared: nn.Module, step: int, draw: int, device: torch.device) -> tuple[Tensor, dict]:
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + draw)
        chosen = ids[torch.randint(len(ids), (count,), generator=generator)]
        noise = torch.randn(count, student.config.in_channels, *[student.config.sample_size] * 2, generator=generator)
        with torch.no_grad():
            texts = _texts(module, torch.cat([empty.expand(count, -1), chosen]).to(device))
            unguided, told = zip(*(text.chunk(2) for text in texts), strict=True)
            states = _visited(prepared, noise.to(device), levels, told)
            own = [torch.cat([text] * steps) for text in told]
            both = [torch.cat([*[empty_text] * steps, text]) for empty_text, text in zip(unguided, own, strict=True)]
            both = [text.to(teacher.dtype) for text in both]

            def velocity(latents: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
                inputs = torch.cat([latents, latents]).to(teacher.dtype), torch.cat([at, at])
                return velocity_of(teacher, *inputs, *both).chunk(2)

            end = teacher_end(
                velocity,
                states,
                sigmas,
                1 / steps,
                num_steps=settings.teacher_steps,
                guidance_scale=settings.guidance_scale,
            )
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            losses = prepared(states, sigmas, *own, steps * (states - end))
        return losses.mean(), {f"loss_{i}": part.detach().mean() for i, part in enumerate(losses.chunk(steps))}

    optimizers = build_optimizers(optimizer, straight, training) if optimizer else muon_and_adamw(straight, training)
    done = train(straight, loss_of_step, training, folder, max_seconds=max_seconds, optimizers=optimizers)
    return done, student


def _visited(student: nn.Module, noise: Tensor, levels: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """The student's own states at all levels, from noise (B, ...): (n B, ...), level by level."""
    states = [noise]
    for level in levels[:-1]:
        velocity = student(states[-1], level.expand(len(noise)), *texts)
        states.append(states[-1] - velocity.float() / len(levels))
    return torch.cat(states)


def _texts(module: FlowMatchingLoss, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    features, pooled = module.encode(clip_ids, t5_ids_of(clip_ids, MAX_LENGTH))
    return features.float(), pooled.float()


def _caption_ids(seed: int) -> Tensor:
    """Token ids (N, 16) of training captions, an equal number of each category."""
    rng = np.random.default_rng([seed, 3])
    captions = [
        write_caption(sample_facts(rng, CATEGORIES[i % len(CATEGORIES)], held_out=False)) for i in range(NUM_CAPTIONS)
    ]
    return build_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids


def load_teacher(model: Path) -> FlowMatchingLoss:
    """The transformer and text encoders of a model that ``trimtab.recipes.train`` wrote, float32."""
    pipe = StableDiffusion3Pipeline.from_pretrained(model, vae=None, dtype=torch.float32)
    module = FlowMatchingLoss(pipe.transformer)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        setattr(module, name, getattr(pipe, name))
    return module


def main(arguments: list[str] | None = None) -> None:
    """Distils the bundled model and writes the student into its repository."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=tuple(PRESETS), default=default, help=f"default here: {default}")
    parser.add_argument("--folder", type=Path, default=Path("out/distillation"), help="where the checkpoint lies")
    parser.add_argument("--model", type=Path, default=asset_path("emoji-scenes"), help="the teacher's repository")
    parser.add_argument("--output", type=Path, help=f"where {SUBFOLDER}/ goes (default: beside the teacher)")
    parser.add_argument("--max-seconds", type=float, help="stop with a checkpoint after this time")
    parser.add_argument("--optimizer", help=f"{', '.join(OPTIMIZERS)} or any of torch.optim (default: muon)")
    parser.add_argument("--learning-rate", type=float, help="in the place of the preset's, which is Muon's and AdamW's")
    add_curvature_argument(parser)
    parser.add_argument("--write", action="store_true", help="write the checkpoint's averaged weights as they are")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    module = load_teacher(options.model)
    if options.write:
        averaged_weights(StraightStep(module.transformer), options.folder)
        done, student = True, module.transformer
    else:
        settings = PRESETS[options.preset]
        if options.learning_rate is not None:
            settings = replace(settings, training=replace(settings.training, learning_rate=options.learning_rate))
        if options.curvature:
            settings = with_curvature(settings)
        done, student = distil(
            module, settings, options.folder, max_seconds=options.max_seconds, optimizer=options.optimizer
        )
    if not done:
        print(f"stopped after {options.max_seconds:g} s; run the same command to go on")
        return
    save_part(student, (options.output or options.model) / SUBFOLDER)


if __name__ == "__main__":
    main()
