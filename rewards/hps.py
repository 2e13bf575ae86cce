"""HPSv2.1: OpenCLIP weights under the names of transformers' `CLIPModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .clip import CLIPReward
from .resize import Preprocessing
from .state_dict import load_exactly, read_weights, renamed

__all__ = ["HPSReward", "clip_model_from_open_clip"]

TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_HEADS = 16  # of both towers of ViT-H/14; weights don't tell
_LAYER = (  # OpenCLIP's name within a layer, transformers' name
    (r"ln_(1|2)\.(weight|bias)", r"layer_norm\2.\3"),
    (r"attn\.out_proj\.(weight|bias)", r"self_attn.out_proj.\2"),
    (r"mlp\.c_fc\.(weight|bias)", r"mlp.fc1.\2"),
    (r"mlp\.c_proj\.(weight|bias)", r"mlp.fc2.\2"),
    (r"attn\.(q|k|v)\.(weight|bias)", r"self_attn.\2_proj.\3"),
)
_RULES = (
    (r"(logit_scale)", r"\1"),
    (r"token_embedding\.weight", r"text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", r"text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", r"text_projection.weight"),
    (r"visual\.class_embedding", r"vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", r"vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", r"vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", r"visual_projection.weight"),
    *(
        (rf"visual\.transformer\.resblocks\.(\d+)\.{old}", rf"vision_model.encoder.layers.\1.{new}")
        for old, new in _LAYER
    ),
    *((rf"transformer\.resblocks\.(\d+)\.{old}", rf"text_model.encoder.layers.\1.{new}") for old, new in _LAYER),
)


class HPSReward(CLIPReward):
    """Human Preference Score v2.1: the cosine of picture and prompt by a ViT-H/14 tuned on people's choices.

    The published preprocessing pads pictures to a square; here they are cropped, as ReNO does, which is the same for
    square pictures. Wu et al., "Human Preference Score v2", arXiv 2306.09341.
    """

    @classmethod
    def from_weights(
        cls,
        path: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: str = TOKENIZER,
    ) -> HPSReward:
        """Loads the published weights, once they are a safetensors file (see `trimtab.rewards.save_weights`).

        Args:
            path: the file: OpenCLIP's names, as in `HPS_v2.1_compressed.pt["state_dict"]`.
            device: where it runs.
            dtype: of its weights.
            tokenizer: folder or Hub id of CLIP's tokenizer.

        Raises:
            ValueError: if the weights are others.
        """
        from transformers import AutoTokenizer

        model = clip_model_from_open_clip(read_weights(path)).to(dtype)
        side = model.config.vision_config.image_size
        preprocessing = Preprocessing(size=side, crop=(side, side))
        reward = cls(model, AutoTokenizer.from_pretrained(tokenizer), preprocessing, name="hpsv2.1", scaled=False)
        return reward.to(device)


def clip_model_from_open_clip(state: dict[str, Tensor], heads: int = _HEADS) -> Any:
    """A `CLIPModel` with the weights of an OpenCLIP model of the ViT-H/14 kind.

    Args:
        state: OpenCLIP's state dict. Sizes are read off the shapes.
        heads: attention heads of either tower.

    Returns:
        The model, float32.

    Raises:
        ValueError: if weights are missing, left over or of another shape.
    """
    from transformers import CLIPConfig, CLIPModel

    split = {name: value.float() for name, value in _split_attention(state).items() if not name.endswith("attn_mask")}
    for name in ("text_projection", "visual.proj"):  # OpenCLIP multiplies from the right
        if name in split:
            split[name] = split[name].t()
    converted = renamed(split, _RULES)
    if len(converted) < len(split):
        left = sorted(name for name in split if not renamed({name: split[name]}, _RULES))
        raise ValueError(f"the weights are not those of an OpenCLIP model: they also have {', '.join(left[:3])}")
    try:
        config = CLIPConfig(**_sizes(split, heads))
    except KeyError as error:
        raise ValueError(f"the weights are not those of an OpenCLIP model: they lack {error}") from None
    model = CLIPModel(config)
    load_exactly(model, converted, "an OpenCLIP model")
    return model


def _split_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values apart, which OpenCLIP keeps in one matrix."""
    result = {}
    for name, value in state.items():
        start, joined, kind = name.rpartition("in_proj_")
        if not joined:
            result[name] = value
            continue
        for part, rows in zip(("q", "k", "v"), value.chunk(3), strict=True):
            result[f"{start}{part}.{kind}"] = rows
    return result


def _sizes(state: dict[str, Tensor], heads: int) -> dict[str, Any]:
    """The fields of a `CLIPConfig`, by the shapes of OpenCLIP's weights."""
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    side = patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    projection = len(state["text_projection"])

    def tower(start: str, width: int) -> dict[str, Any]:
        layers = {name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(f"{start}resblocks.")}
        return {
            "hidden_size": width,
            "intermediate_size": len(state[f"{start}resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
            "projection_dim": projection,
            "hidden_act": "gelu",
        }

    text = {
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        "eos_token_id": vocabulary - 1,  # OpenCLIP pools at the largest id, which ends every text
        "bos_token_id": vocabulary - 2,
    }
    return {
        "text_config": tower("transformer.", text_width) | text,
        "vision_config": tower("visual.transformer.", vision_width) | {"image_size": side, "patch_size": patch},
        "projection_dim": projection,
    }
