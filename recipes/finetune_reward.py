"""Finetunes a Stable Diffusion 3 model on a reward without a gradient: ``python -m trimtab.recipes.finetune_reward``.

Without other words it teaches the bundled four-step model to count, by a judge of pictures. Run the same command again
after an interruption; ``accelerate launch -m trimtab.recipes.finetune_reward ...`` runs it in several processes. What
it writes is a LoRA: ``pipe.load_lora_weights("out/finetune_reward/lora")``.

The sampler with noise in its steps is the policy (DDPO, arXiv 2305.13301; Flow-GRPO, arXiv 2505.05470), whose exact
log-densities :class:`trimtab.schedulers.FlowMatchStochasticScheduler` gives. Estimators by name: see
:class:`trimtab.recipes.reward_rollouts.Estimator`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from trimtab.assets import FEW_STEPS, asset_path
from trimtab.optim import HARPG, NormalizedPGIGT

from .command_line import add_run_arguments, report_end, training_settings
from .denoising_policy import DenoisingPolicy, GuidedVelocity, encode_captions
from .emoji_scenes import CATEGORIES, check_scene, sample_facts, write_caption
from .finetune import lora_layers, save_result
from .optimizers import build_optimizers
from .policy_update import PolicyUpdate
from .reward_rollouts import ESTIMATORS, NORMALIZED, Estimator, Reward
from .training_loop import TrainingSettings, averaged_weights, train

__all__ = [
    "REWARDS",
    "RewardFinetuning",
    "finetune_reward",
    "load_pipeline",
    "load_result",
    "main",
    "scene_reward",
    "training_captions",
]

REWARDS = ("correct", "right_share")
SIGMAS = (1.0, 0.75, 0.5, 0.25)
RATES = {"npg_igt": 0.1, "n_harpg": 0.1, "harpg": 1e-5}
"""Learning rates, where not AdamW's: lengths of a step for the normalized ones."""


@dataclass(frozen=True)
class RewardFinetuning:
    """What is trained, and how.

    Attributes:
        training: its ``batch_size`` counts the rollouts of one draw in one process, ``accumulation`` the draws of a
            step.
        estimator: see :class:`Estimator`.
        rank: of LoRA.
        optimizer: a name that :func:`build_optimizers` takes, where the estimator is no optimizer itself.
        sigmas: noise levels of the sampler's evaluations.
        noise_level: of the sampler's steps.
        transition: "ddim" or "sde".
        learnt: so many first transitions are learnt; None is all that have noise.
        guidance_scale: 1 is without classifier-free guidance.
        momentum: of the normalized methods, constant.
        max_sequence_length: tokens of T5.
    """

    training: TrainingSettings
    estimator: Estimator = field(default_factory=Estimator)
    rank: int = 16
    optimizer: str = "adamw"
    sigmas: Sequence[float] = SIGMAS
    noise_level: float = 0.7
    transition: str = "ddim"
    learnt: int | None = 2
    guidance_scale: float = 1.0
    momentum: float = 0.3
    max_sequence_length: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` is {self.rank}; takes an integer >= 1")
        size, group = self.training.batch_size, self.estimator.group_size
        if size % group:
            raise ValueError(f"`batch_size` is {size}; takes a multiple of the group's {group}")
        if self.learnt is not None and self.learnt < 1:
            raise ValueError(f"`learnt` is {self.learnt}; takes an integer >= 1 or None")
        if self.noise_level <= 0:
            raise ValueError(f"`noise_level` is {self.noise_level}; takes a number > 0: a policy draws its actions")
        if self.estimator.name in NORMALIZED and self.training.mixed_precision == "fp16":
            raise ValueError(f"`mixed_precision` is 'fp16', which scales gradients; takes others for {self.estimator}")


def scene_reward(kind: str = "correct") -> Reward:
    """A judge of EmojiScenes as a reward: 1 where all is right, or the share that is; the first are the successes.

    Raises:
        ValueError: another kind.
    """
    if kind not in REWARDS:
        raise ValueError(f"`kind` is {kind!r}; takes {', '.join(REWARDS)}")

    def reward(pictures: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        verdicts = check_scene(pictures, list(captions))
        successes = torch.tensor([float(verdict.correct) for verdict in verdicts])
        return (successes if kind == "correct" else torch.tensor([float(v.right_share) for v in verdicts])), successes

    return reward


def training_captions(categories: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Different captions of the facts that training may see, the categories in turn."""
    rng, found = np.random.default_rng([seed, 12]), {}
    for number in range(20 * count):
        caption = write_caption(sample_facts(rng, categories[number % len(categories)], held_out=False))
        found[caption] = None
        if len(found) == count:
            break
    return list(found)


def finetune_reward(
    pipe: StableDiffusion3Pipeline,
    captions: Sequence[str],
    reward: Reward,
    settings: RewardFinetuning,
    folder: Path,
    *,
    max_seconds: float | None = None,
    trackers: Sequence[object] = (),
) -> bool:
    """Trains a LoRA of the pipeline's transformer, from the checkpoint in ``folder`` where there is one.

    Args:
        pipe: its transformer ends up with an adapter of the averaged weights.
        captions: the training prompts.
        reward: pictures (B, 3, H, W) in [0, 1] and captions to rewards (B,) and successes (B,); no gradient is asked.
        settings: see :class:`RewardFinetuning`.
        folder: of the checkpoint and the log.
        max_seconds: stop after this time with a checkpoint; None runs to the end.
        trackers: of accelerate, by name or object.

    Returns:
        Whether all steps are done.

    Raises:
        ValueError: no captions, or a transformer without the layers that LoRA takes.
    """
    length = settings.max_sequence_length
    texts = encode_captions(pipe, captions, max_sequence_length=length)
    nothing = encode_captions(pipe, [""], max_sequence_length=length)
    transformer = pipe.transformer
    _add_lora(transformer, settings.rank, settings.training.seed)
    module = GuidedVelocity(transformer.float(), nothing, settings.guidance_scale)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe.vae.to(device)
    policy = DenoisingPolicy(
        pipe,
        settings.sigmas,
        noise_level=settings.noise_level,
        transition=settings.transition,
        learnt=settings.learnt,
    )
    training = settings.training
    update = PolicyUpdate(
        policy,
        module,
        texts,
        reward,
        settings.estimator,
        prompts=training.batch_size // settings.estimator.group_size,
        draws=training.accumulation,
        seed=training.seed,
    )
    return train(
        module,
        None,
        training,
        folder,
        max_seconds=max_seconds,
        optimizers=_optimizers(module, settings),
        update=update,
        trackers=trackers,
    )


def _add_lora(transformer: nn.Module, rank: int, seed: int) -> None:
    if not getattr(transformer, "peft_config", None):
        torch.manual_seed(seed)  # peft draws the first matrices from the global generator
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=lora_layers(transformer)))


def _optimizers(module: nn.Module, settings: RewardFinetuning) -> list[torch.optim.Optimizer]:
    name, rate = settings.estimator.name, settings.training.learning_rate
    if name not in NORMALIZED:
        return build_optimizers(settings.optimizer, module, settings.training)
    trained = [p for p in module.parameters() if p.requires_grad]
    options = {"lr": rate, "momentum": settings.momentum, "schedule": "constant"}
    if name == "npg_igt":
        return [NormalizedPGIGT(trained, **options)]
    return [HARPG(trained, normalize=name == "n_harpg", **options)]


def load_pipeline(model: Path, transformer: str) -> StableDiffusion3Pipeline:
    """A repository's pipeline in float32, with the transformer in the named subfolder of it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        model,
        transformer=SD3Transformer2DModel.from_pretrained(model, subfolder=transformer, dtype=torch.float32),
        dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_result(pipe: StableDiffusion3Pipeline, folder: Path) -> int:
    """Gives ``pipe`` the averaged LoRA weights of a run's checkpoint, done or not; gives the step they are of."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        name = next(name for name in file.keys() if "lora_A" in name)  # noqa: SIM118
        rank = file.get_slice(name).get_shape()[0]
    _add_lora(pipe.transformer, rank, 0)
    return averaged_weights(GuidedVelocity(pipe.transformer), folder)


def main(arguments: list[str] | None = None) -> None:
    """Finetunes and writes the result."""
    options = _parser().parse_args(arguments)
    pipe = load_pipeline(options.model, options.transformer)
    rate = options.learning_rate or RATES.get(options.estimator, 4e-4)
    training = training_settings(options, rate, weight_decay=0.0)
    estimator = Estimator(
        options.estimator,
        options.group_size,
        passes=options.passes,
        gate=options.gate,
        demo_draws=options.demo_draws,
        demo_coef=options.demo_coef,
    )
    settings = RewardFinetuning(
        training,
        estimator,
        options.rank,
        options.optimizer,
        options.sigmas,
        options.noise_level,
        options.transition,
        options.learnt,
        options.guidance_scale,
    )
    done = finetune_reward(
        pipe,
        training_captions(options.category, options.captions, options.seed),
        scene_reward(options.reward),
        settings,
        options.output,
        max_seconds=options.max_seconds,
        trackers=options.tracker,
    )
    report_end(done, options, lambda: save_result(pipe, "lora", options.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--estimator", choices=ESTIMATORS, default=Estimator.name)
    add("--category", nargs="+", choices=CATEGORIES, default=["count"], help="of the training captions")
    add("--reward", choices=REWARDS, default="correct")
    add("--captions", type=int, default=1024, help="how many to train on")
    add("--model", type=Path, default=asset_path("emoji-scenes"), help="a Stable Diffusion 3 repository")
    add("--transformer", default=FEW_STEPS, help="subfolder of the transformer to train")
    add("--output", type=Path, default=Path("out/finetune_reward"))
    add("--sigmas", type=float, nargs="+", default=list(SIGMAS), help="noise levels of the evaluations")
    add("--noise-level", type=float, default=0.7)
    add("--transition", choices=("ddim", "sde"), default="ddim")
    add("--learnt", type=int, default=2, help="so many first steps of the sampler are learnt")
    add("--guidance-scale", type=float, default=1.0)
    add("--group-size", type=int, default=8, help="rollouts of a prompt")
    add("--passes", type=int, default=1, help="optimizer steps from one draw")
    add("--gate", type=float, default=0.0, help="of hybrid: share solved up to which a demonstration is taken")
    add("--demo-draws", type=int, default=8, help="of hybrid: further rollouts where none succeeded")
    add("--demo-coef", type=float, default=1.0)
    add("--optimizer", default="adamw", help="of the estimators that are none themselves")
    add("--learning-rate", type=float, help="default: 4e-4 for AdamW; 2e-3 loses the policy")
    add("--batch-size", type=int, default=64, help="rollouts of a draw in each process")
    add("--accumulation", type=int, default=1, help="draws of a step")
    add("--mixed-precision", choices=("no", "bf16"), default="no")
    add_run_arguments(parser, warmup_steps=5, steps=150, ema_decay=0.9, log_every=1)
    return parser


if __name__ == "__main__":
    main()
