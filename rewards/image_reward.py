"""ImageReward: a BLIP that reads the prompt while it looks at the picture, and a linear head on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardModel, Tokenize
from .resize import Preprocessing
from .state_dict import load_exactly, read_weights, renamed

__all__ = ["ImageReward", "linear_head"]

TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_LENGTH = 35
_VISION_HEADS, _TEXT_HEADS = 16, 12  # of BLIP with a ViT-L; weights don't tell
_VISION_RULES = (
    (r"cls_token", r"embeddings.class_embedding"),
    (r"pos_embed", r"embeddings.position_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm(1|2)\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
    (r"norm\.(\w+)", r"post_layernorm.\1"),
)


class ImageReward(RewardModel):
    """ImageReward-v1.0: r = (head(h) - 0.167) / 1.033, h the first token of BLIP's text encoder on the picture.

    Xu et al., "ImageReward", arXiv 2304.05977. Texts are padded and cut to 35 tokens, as published.

    Args:
        vision: `BlipVisionModel`.
        text: `BlipTextModel` with cross-attention, without a pooler.
        head: h (B, D) to (B, 1).
        tokenizer: BERT's.

    The models are frozen here.
    """

    name = "imagereward"

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        side = vision.config.image_size
        self.preprocessing = Preprocessing(size=side, crop=(side, side))
        self.tokenize = Tokenize(tokenizer, MAX_LENGTH, padding="max_length")
        self.freeze()

    @classmethod
    def from_weights(
        cls,
        path: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: str = TOKENIZER,
    ) -> ImageReward:
        """Loads the published weights, once they are a safetensors file (see `trimtab.rewards.save_weights`).

        Args:
            path: the file: names as in `ImageReward.pt`.
            device: where it runs.
            dtype: of its weights.
            tokenizer: folder or Hub id of BERT's uncased tokenizer.

        Raises:
            ValueError: if the weights are others.
        """
        from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        parts = _parts({name: value.float() for name, value in read_weights(path).items()})
        try:
            vision_sizes, text_sizes = _sizes(parts)
        except KeyError as error:
            raise ValueError(f"the weights are not those of ImageReward: they lack {error}") from None
        vision = BlipVisionModel(BlipVisionConfig(**vision_sizes))
        text = BlipTextModel(BlipTextConfig(**text_sizes), add_pooling_layer=False)
        head = linear_head(parts["mlp"])
        load_exactly(vision, renamed(parts["vision"], _VISION_RULES), "ImageReward's picture encoder")
        load_exactly(text, parts["text"], "ImageReward's text encoder")
        reward = cls(vision.to(dtype), text.to(dtype), head.to(dtype), AutoTokenizer.from_pretrained(tokenizer))
        return reward.to(device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,); see the class."""
        pixels = self.preprocessing(images).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenize(prompts, seen.device)
        mask = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(**tokens, encoder_hidden_states=seen, encoder_attention_mask=mask).last_hidden_state
        return (self.head(read[:, 0])[:, 0].float() - MEAN) / STD


def linear_head(state: dict[str, Tensor]) -> nn.Module:
    """The linear layers, dropout between them, of the heads of ImageReward and of the aesthetic predictor.

    Args:
        state: weights under the published names: `layers.0.weight`, `layers.2.weight` and so on.

    Returns:
        A module (B, D) to (B, 1).

    Raises:
        ValueError: if it is no such head.
    """
    layers = {int(name.split(".")[1]): tuple(state[name].shape) for name in state if name.endswith(".weight")}
    if not layers or not all(name.startswith("layers.") for name in state):
        raise ValueError(f"the weights are not those of a head: they have {', '.join(sorted(state)[:3])}")
    parts = [
        nn.Linear(layers[index][1], layers[index][0]) if index in layers else nn.Dropout(0.0)
        for index in range(max(layers) + 1)
    ]
    head = nn.Sequential(*parts)
    load_exactly(head, {name.removeprefix("layers."): value for name, value in state.items()}, "a head")
    return head


def _parts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    starts = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "mlp": "mlp."}
    unused = ("position_ids",)  # a buffer that is counted anew
    return {
        part: {
            name.removeprefix(start): value
            for name, value in state.items()
            if name.startswith(start) and not name.endswith(unused)
        }
        for part, start in starts.items()
    }


def _sizes(parts: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of BLIP's two configs, by the shapes of the weights."""
    vision, text = parts["vision"], parts["text"]
    width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
    return (
        {
            "hidden_size": width,
            "intermediate_size": len(vision["blocks.0.mlp.fc1.bias"]),
            "num_hidden_layers": len({name.split(".")[1] for name in vision if name.startswith("blocks.")}),
            "num_attention_heads": _VISION_HEADS,
            "image_size": patch * round((vision["pos_embed"].shape[1] - 1) ** 0.5),
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
        },
        {
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "encoder_hidden_size": text["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            "intermediate_size": len(text["encoder.layer.0.intermediate.dense.bias"]),
            "num_hidden_layers": len({name.split(".")[2] for name in text if name.startswith("encoder.layer.")}),
            "num_attention_heads": _TEXT_HEADS,
            "max_position_embeddings": len(text["embeddings.position_embeddings.weight"]),
            "is_decoder": True,  # which here means: with cross-attention
            "use_cache": False,
        },
    )
