"""The small pretraining that the training optimizers are compared on: its data, its network and one run of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.assets import asset_path
from trimtab.optim import DCTAdamW, Frugal, Lanton, Trion
from trimtab.recipes.distil import load_teacher
from trimtab.recipes.train_transformer import build_transformer, encode_scenes, t5_ids_of

__all__ = ["METHODS", "RATES", "Run", "Scenes", "block_matrices", "load_scenes", "pretrain", "state_bytes"]

BATCH, VALIDATION = 8, 256
DENSITY, RANK, GAP = 0.25, 32, 50
BETAS, DECAY = (0.9, 0.95), 0.01
RATES = (1e-3, 3e-3, 1e-2)
"""The grid that every method's rate is chosen from."""


@dataclass(frozen=True)
class Scenes:
    """Latents (N, 8, 16, 16), CLIP features (N, 16, 256) and pooled features (N, 256) of training scenes, float16."""

    latents: Tensor
    features: Tensor
    pooled: Tensor

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.latents[index].float(), self.features[index].float(), self.pooled[index].float()


@torch.no_grad()
def load_scenes(folder: Path, count: int = 3_000) -> tuple[Scenes, Scenes]:
    """Training and validation scenes with the bundled model's autoencoder and text encoders."""
    model = asset_path("emoji-scenes")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32)
    encoded = encode_scenes(vae, count + VALIDATION, folder / "scenes.safetensors")
    teacher = load_teacher(model).eval()
    parts = [teacher.encode(ids, t5_ids_of(ids, 16)) for ids in encoded.token_ids.split(256)]
    features = torch.cat([features[:, :16] for features, _ in parts]).half()
    pooled = torch.cat([pooled for _, pooled in parts]).half()
    whole = Scenes(encoded.latents, features, pooled)
    return Scenes(*whole.take(slice(count))), Scenes(*whole.take(slice(count, None)))


def block_matrices(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of the transformer's blocks, which the methods treat in their own way, and all the rest."""
    matrices = [p for name, p in module.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in module.parameters() if id(p) not in chosen]


def _adamw(params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, betas=BETAS, weight_decay=DECAY)


def _galore(matrices: list[Tensor], rest: list[Tensor], lr: float) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import GaLore

    low = {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "projection_type": "std"}
    return [GaLore([{"params": matrices, **low}], lr=lr, betas=BETAS, eps=1e-8, weight_decay=DECAY), _adamw(rest, lr)]


def _dct(**options) -> Callable:
    def build(matrices: list[Tensor], rest: list[Tensor], lr: float) -> list[torch.optim.Optimizer]:
        return [DCTAdamW(matrices, lr, rank=RANK, betas=BETAS, weight_decay=DECAY, **options), _adamw(rest, lr)]

    return build


def _frugal(**options) -> Callable:
    def build(matrices: list[Tensor], rest: list[Tensor], lr: float) -> list[torch.optim.Optimizer]:
        settings = {"betas": BETAS, "weight_decay": DECAY, "density": DENSITY, "update_gap": GAP, **options}
        return [Frugal(matrices, lr, **settings), _adamw(rest, lr)]

    return build


def _lanton(**options) -> Callable:
    def build(matrices: list[Tensor], rest: list[Tensor], lr: float) -> list[torch.optim.Optimizer]:
        settings = {"weight_decay": DECAY, "nesterov": True, "ns_dtype": torch.float32, **options}
        return [Lanton(matrices, lr, **settings), _adamw(rest, lr)]

    return build


def _trion(matrices: list[Tensor], rest: list[Tensor], lr: float) -> list[torch.optim.Optimizer]:
    return [Trion(matrices, lr, rank=RANK, weight_decay=DECAY, ns_dtype=torch.float32), _adamw(rest, lr)]


METHODS: dict[str, Callable[[list[Tensor], list[Tensor], float], list[torch.optim.Optimizer]]] = {
    "AdamW": lambda matrices, rest, lr: [_adamw([*matrices, *rest], lr)],
    # torch.optim.Muon's steps with the orthogonalisation in float32: in bfloat16 it is emulated on many processors.
    "Muon": _lanton(min_scale=1.0),
    "GaLore": _galore,
    "FRUGAL": _frugal(),
    "DCT-AdamW": _dct(),
    "LANTON": _lanton(alpha=0.01),
    "DCT-AdamW, 8-bit feedback": _dct(error_feedback="8bit"),
    "DCT-AdamW, full feedback": _dct(error_feedback="full"),
    "Trion": _trion,
    "FRUGAL, dct": _frugal(projection="dct", reset_state=False),
    "FRUGAL, density 0": _frugal(density=0.0),
}
"""Each method's optimizers for the blocks' matrices, the other parameters and a learning rate."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        method: a key of `METHODS`.
        rate: learning rate at its highest.
        steps: optimizer steps.
        seed: of weights and data.
        loss: validation loss at the end.
        state_bytes: of all optimizers' states, and of the blocks' matrices alone in ``matrix_state_bytes``.
        seconds_a_step: median of a step's computing time, and of the optimizers' part in ``optimizer_seconds``.
    """

    method: str
    rate: float
    steps: int
    seed: int
    loss: float
    state_bytes: int
    matrix_state_bytes: int
    seconds_a_step: float
    optimizer_seconds: float

    def row(self) -> dict:
        return asdict(self)


def _loss(model: SD3Transformer2DModel, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    latents, features, pooled = batch
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.sigmoid(torch.randn(len(latents), generator=generator))
    scale = sigmas.view(-1, 1, 1, 1)
    with sdpa_kernel(SDPBackend.MATH) if not torch.cuda.is_available() else nullcontext():
        velocity = model(
            hidden_states=(1 - scale) * latents + scale * noise,
            timestep=sigmas * 1000,
            encoder_hidden_states=features,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return (velocity - (noise - latents)).square().mean()


@torch.no_grad()
def _validate(model: SD3Transformer2DModel, scenes: Scenes) -> float:
    generator = torch.Generator().manual_seed(12345)
    parts = torch.arange(len(scenes.latents)).split(64)
    return statistics.fmean(float(_loss(model, scenes.take(index), generator)) for index in parts)


def state_bytes(optimizers: Sequence[torch.optim.Optimizer], params: Iterable[Tensor] | None = None) -> int:
    """Bytes of all tensors in the optimizers' states; of some parameters alone where they are given."""
    chosen = None if params is None else {id(p) for p in params}
    total = 0
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            if chosen is not None and id(p) not in chosen:
                continue
            values = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
            total += sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
    return total


def pretrain(method: str, rate: float, steps: int, seed: int, training: Scenes, validation: Scenes) -> Run:
    """Trains a two-layer transformer of width 128 under a warm-up of 5 % and half a cosine; one thread's seconds.

    Weights and data depend on the seed alone.
    """
    torch.manual_seed(seed)
    model = build_transformer(num_layers=2, num_attention_heads=2)
    matrices, rest = block_matrices(model)
    optimizers = METHODS[method](matrices, rest, rate)
    whole, inner, warm = [], [], max(1, steps // 20)
    for step in range(steps):
        started = time.process_time()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, (step + 1) / warm) * cosine
        index = torch.randint(len(training.latents), (BATCH,), generator=generator)
        _loss(model, training.take(index), generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.process_time()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        inner.append(time.process_time() - before)
        whole.append(time.process_time() - started)
    return Run(
        method,
        rate,
        steps,
        seed,
        _validate(model, validation),
        state_bytes(optimizers),
        state_bytes(optimizers, matrices),
        statistics.median(whole),
        statistics.median(inner),
    )
