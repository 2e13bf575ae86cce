"""Teaches a Stable Diffusion 3 model an object or a style: ``python -m trimtab.recipes.finetune --train lora``.

Without ``--data`` it teaches the bundled model a bell, which it has never seen, from 50 scenes. Run the same command
again after an interruption; ``accelerate launch -m trimtab.recipes.finetune ...`` runs it in several processes. What it
writes loads into the stock pipeline: ``pipe.load_lora_weights("out/finetune/lora")``, or
``SD3Transformer2DModel.from_pretrained("out/finetune/transformer")``.

The loss is that of rectified flow with noise levels from a logit-normal distribution (Esser et al., arXiv 2403.03206);
a tenth of the captions is dropped for classifier-free guidance. LoRA is Hu et al., arXiv 2106.09685, by peft.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.assets import asset_path
from trimtab.optim import AdaptiveBatchSize

from .assemble import save_part
from .captioned_pictures import EncodedPictures, encode_pictures, read_pictures, write_object_scenes
from .command_line import add_run_arguments, report_end, training_settings
from .curvature import add_curvature_argument
from .distil import StraightStep
from .emoji_scenes.new_object import BELL
from .optimizers import build_optimizers
from .training_loop import TrainingSettings, train

__all__ = ["LORA_LAYERS", "Finetuning", "finetune", "lora_layers", "main", "save_result"]

LORA_LAYERS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
"""Ends of the names of the layers that LoRA is added to."""
DROPPED_CAPTIONS = 0.1


@dataclass(frozen=True)
class Finetuning:
    """What is trained, and how.

    Attributes:
        training: its ``batch_size`` counts pictures of one micro-batch in one process.
        train: "lora" or "full".
        rank: of LoRA.
        optimizer: a name that :func:`build_optimizers` takes.
        max_batch_size: above 0 the batch starts at that of ``training`` and grows by the norm test up to this.
        guidance_scale: of validation pictures.
    """

    training: TrainingSettings
    train: str = "lora"
    rank: int = 16
    optimizer: str = "adamw"
    max_batch_size: int = 0
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        if self.train not in ("lora", "full"):
            raise ValueError(f"`train` is {self.train!r}; takes 'lora' or 'full'")
        if self.rank < 1:
            raise ValueError(f"`rank` is {self.rank}; takes an integer >= 1")


def finetune(
    pipe: StableDiffusion3Pipeline,
    pictures: EncodedPictures,
    settings: Finetuning,
    folder: Path,
    *,
    max_seconds: float | None = None,
    validation_prompts: Sequence[str] = (),
    validate_every: int = 0,
    trackers: Sequence[object] = (),
) -> bool:
    """Trains the pipeline's transformer, from the checkpoint in ``folder`` where there is one.

    Args:
        pipe: its transformer ends up with the averaged weights, under LoRA with an adapter.
        pictures: from :func:`encode_pictures`.
        settings: see :class:`Finetuning`.
        folder: of the checkpoint, the log and ``validation/``.
        max_seconds: stop after this time with a checkpoint; None runs to the end.
        validation_prompts: drawn with the averaged weights every ``validate_every`` steps and at the end.
        validate_every: 0 draws them at the end alone.
        trackers: of accelerate, by name or object.

    Returns:
        Whether all steps are done.
    """
    transformer = pipe.transformer
    if settings.train == "lora":
        if not getattr(transformer, "peft_config", None):
            torch.manual_seed(settings.training.seed)  # peft draws the first matrices from the global generator
            transformer.add_adapter(
                LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=lora_layers(transformer))
            )
    else:
        transformer.requires_grad_(True)
    module = StraightStep(transformer.float())

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = _batch(pictures, settings.training, draw)
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            return prepared(*(tensor.to(device) for tensor in inputs)).mean(), {}

    def validate(step: int) -> None:
        _write_validation(pipe, validation_prompts, settings.guidance_scale, folder / "validation" / f"{step:06d}.png")

    return train(
        module,
        loss_of_step,
        settings.training,
        folder,
        max_seconds=max_seconds,
        optimizers=build_optimizers(settings.optimizer, module, settings.training),
        batch=_batch_size(settings),
        trackers=trackers,
        validate=validate if validation_prompts else None,
        validate_every=validate_every,
    )


def lora_layers(transformer: nn.Module) -> list[str]:
    """Names of the layers for LoRA; the last block lacks some."""
    found = [name for name, _ in transformer.named_modules() if name.endswith(LORA_LAYERS)]
    if not found:
        raise ValueError(f"`pipe`'s transformer has no layer that ends in {', '.join(LORA_LAYERS)}")
    return found


def _batch(pictures: EncodedPictures, training: TrainingSettings, draw: int) -> tuple[Tensor, ...]:
    """Noisy latents, noise levels, text features and target velocities of one micro-batch."""
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + draw)
    size = training.batch_size
    index = torch.randint(len(pictures.latents), (size,), generator=generator)
    latents = pictures.latents[index]
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.sigmoid(torch.randn(size, generator=generator))
    dropped = torch.rand(size, generator=generator) < DROPPED_CAPTIONS
    features = torch.where(dropped[:, None, None], pictures.no_features, pictures.features[index])
    pooled = torch.where(dropped[:, None], pictures.no_pooled, pictures.pooled[index])
    scale = sigmas.view(-1, 1, 1, 1)
    return (1.0 - scale) * latents + scale * noise, sigmas, features, pooled, noise - latents


def _batch_size(settings: Finetuning) -> AdaptiveBatchSize | None:
    if not settings.max_batch_size:
        return None
    from accelerate import PartialState

    processes, micro = PartialState().num_processes, settings.training.batch_size
    initial = micro * processes * max(settings.training.accumulation, 1 if processes > 1 else 2)
    return AdaptiveBatchSize(
        initial, max_size=settings.max_batch_size, micro_size=micro, num_processes=processes, eta=0.5
    )


@torch.no_grad()
def _write_validation(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], guidance: float, path: Path) -> None:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        list(prompts),
        num_inference_steps=12,
        guidance_scale=guidance,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).images
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    make_image_grid(images, 1, len(images)).save(temporary, "PNG")
    temporary.replace(path)


def save_result(pipe: StableDiffusion3Pipeline, train: str, folder: Path) -> Path:
    """Writes what was trained, under ``folder``: "lora" for ``load_lora_weights``, or "transformer"."""
    if train == "full":
        save_part(pipe.transformer, folder / "transformer")
        return folder / "transformer"
    weights = get_peft_model_state_dict(pipe.transformer)
    temporary = folder / "lora.tmp"
    StableDiffusion3Pipeline.save_lora_weights(temporary, transformer_lora_layers=weights)
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    for item in temporary.iterdir():
        item.replace(folder / "lora" / item.name)
    temporary.rmdir()
    return folder / "lora"


def main(arguments: list[str] | None = None) -> None:
    """Finetunes and writes the result."""
    options = _parser().parse_args(arguments)
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, dtype=torch.float32)
    data = options.data or options.output / "scenes"
    if options.data is None and not (data / "metadata.jsonl").exists():
        write_object_scenes(BELL, data, count=options.scenes, seed=options.seed)
    pictures = encode_pictures(pipe, *read_pictures(data), max_sequence_length=options.max_sequence_length)
    training = training_settings(
        options,
        options.learning_rate or {"lora": 1e-3, "full": 2e-4}[options.train],
        weight_decay=options.weight_decay,
        curvature=options.curvature,
    )
    settings = Finetuning(
        training, options.train, options.rank, options.optimizer, options.max_batch_size, options.guidance_scale
    )
    done = finetune(
        pipe,
        pictures,
        settings,
        options.output,
        max_seconds=options.max_seconds,
        validation_prompts=options.validation_prompt,
        validate_every=options.validate_every,
        trackers=options.tracker,
    )
    report_end(done, options, lambda: save_result(pipe, options.train, options.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", choices=("lora", "full"), default="lora")
    add("--model", type=Path, default=asset_path("emoji-scenes"), help="a Stable Diffusion 3 repository")
    add("--data", type=Path, help="folder with metadata.jsonl and pictures (default: scenes of a bell, made here)")
    add("--scenes", type=int, default=50, help="how many of the bell")
    add("--output", type=Path, default=Path("out/finetune"))
    add("--optimizer", default="adamw", help="adamw, muon, frugal, dct_adamw, trion, lanton, adagrad_norm, shampoo, "
        "soap or a class of torch.optim; FRUGAL and DCT save state under --train full")  # fmt: skip
    add("--learning-rate", type=float, help="default: 1e-3 for LoRA, 2e-4 for full")
    add("--weight-decay", type=float, default=0.01)
    add("--batch-size", type=int, default=16, help="pictures of a micro-batch in each process")
    add("--accumulation", type=int, default=1, help="micro-batches of a step")
    add("--max-batch-size", type=int, default=0, help="above 0 the batch grows up to this by AdAdaGrad's norm test")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: bf16 where the machine has it")
    add("--max-sequence-length", type=int, default=16, help="tokens of T5")
    add("--validation-prompt", action="append", default=[], help="may be given several times")
    add("--validate-every", type=int, default=0)
    add("--guidance-scale", type=float, default=3.0)
    add_curvature_argument(parser)
    add_run_arguments(parser, warmup_steps=20, steps=400, ema_decay=0.98, log_every=10)
    return parser


if __name__ == "__main__":
    main()
