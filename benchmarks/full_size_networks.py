"""Networks of published repositories, made of their configs alone, and what they are called with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from trimtab.pipelines.families import FAMILIES, Family

__all__ = ["PUBLISHED", "Layout", "denoiser_call", "make_network", "reward_network"]

PUBLISHED = Path(__file__).parent / "published"
_TEXT_TOKENS = {"UNet2DConditionModel": 77, "SD3Transformer2DModel": 333}
"""Of the longest prompt that the stock call encodes; 512 elsewhere."""


@dataclass(frozen=True)
class Layout:
    """A repository's components.

    Attributes:
        folder: with `model_index.json`.
        networks: names of the components that have weights, with library and class.
        family: the pipeline's entry in the table.
    """

    folder: Path
    networks: dict[str, tuple[str, str]] = field(init=False)
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        listed = {name: tuple(entry) for name, entry in index.items() if isinstance(entry, list) and entry[0]}
        networks = {name: entry for name, entry in listed.items() if (self.folder / name / "config.json").is_file()}
        family = next(family for family in FAMILIES if index["_class_name"] in family.pipelines)
        object.__setattr__(self, "networks", networks)
        object.__setattr__(self, "family", family)

    @property
    def denoiser(self) -> str:
        return self.family.denoisers[0]

    @property
    def text_encoders(self) -> list[str]:
        return [name for name in self.networks if name not in (self.denoiser, "vae")]


def make_network(layout: Layout, name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A component with random weights, frozen, in evaluation mode.

    Args:
        layout: the repository.
        name: one of `layout.networks`.
        device: "meta" for shapes alone.
        dtype: of the weights.
    """
    library, cls = layout.networks[name]
    with _made_on(device, dtype):
        if library == "diffusers":
            cls = getattr(diffusers, cls)
            network = cls.from_config(cls.load_config(layout.folder / name, local_files_only=True))
        else:
            network = _of_transformers(getattr(transformers, cls), layout.folder / name)
    return network.requires_grad_(False).eval()


def reward_network(device: str, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> nn.Module:
    """The CLIP of PickScore and HPSv2.1 with random weights, in float32 as `load_reward` has it by default."""
    with _made_on(device, dtype):
        network = _of_transformers(transformers.CLIPModel, folder or PUBLISHED / "CLIP-ViT-H-14")
    return network.requires_grad_(False).eval()


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New weights lie there and have this type, so that none is ever held at twice its size."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _of_transformers(cls: Any, folder: Path) -> nn.Module:
    return cls(cls.config_class.from_pretrained(folder, local_files_only=True))


def denoiser_call(
    denoiser: nn.Module, batch: int, side: int, device: str, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """The denoiser as a function of latents, as the stock pipeline calls it at its longest prompt.

    Args:
        denoiser: of one of the published classes.
        batch: B.
        side: of the latents in latent pixels.
        device: of the inputs.
        dtype: of the inputs.

    Returns:
        The function, and the shape of the latents, that of its values.
    """
    config, kind = denoiser.config, type(denoiser).__name__

    def ones(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    text, time = _TEXT_TOKENS.get(kind, 512), ones(batch)
    tokens, wide = (side // 2) ** 2, config.in_channels
    if kind == "UNet2DConditionModel":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra = {
            "encoder_hidden_states": ones(batch, text, config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": ones(batch, pooled), "time_ids": ones(batch, 6)},
        }
        return lambda x: denoiser(x, time, **extra, return_dict=False)[0], (batch, wide, side, side)
    extra = {"encoder_hidden_states": ones(batch, text, config.joint_attention_dim), "timestep": time}
    shape: tuple[int, ...] = (batch, tokens, wide)
    if kind == "SD3Transformer2DModel":
        extra["pooled_projections"] = ones(batch, config.pooled_projection_dim)
        shape = (batch, wide, side, side)
    elif kind == "FluxTransformer2DModel":
        extra |= {"pooled_projections": ones(batch, config.pooled_projection_dim), "guidance": time}
        extra |= {"img_ids": ones(tokens, 3), "txt_ids": ones(text, 3)}
    elif kind == "QwenImageTransformer2DModel":
        extra["img_shapes"] = [[(1, side // 2, side // 2)]] * batch
        extra["encoder_hidden_states_mask"] = ones(batch, text, dtype=torch.long)
    else:
        raise ValueError(f"`denoiser` is a {kind}; takes one of the published layouts")
    return lambda x: denoiser(hidden_states=x, **extra, return_dict=False)[0], shape
