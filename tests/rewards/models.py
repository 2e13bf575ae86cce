"""Tiny random reward models of the real classes, saved as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_pipelines import VOCABULARY, VOCABULARY_SIZE, word_tokenizer

SIDE = 16
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": VOCABULARY["<s>"],
        "eos_token_id": VOCABULARY["</s>"],
        "projection_dim": 12,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 4,
        "projection_dim": 12,
        **more,
    }


def scrambled(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """All weights random, none of them at a value that hides a mistake; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


def clip() -> transformers.CLIPModel:
    config = transformers.CLIPConfig(text_config=_text(), vision_config=_vision(), projection_dim=12)
    return scrambled(transformers.CLIPModel(config))


def siglip() -> transformers.SiglipModel:
    text = _text(projection_size=16, max_position_embeddings=12)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_vision()))
    with torch.no_grad():
        scrambled(model)
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model


def siglip2() -> transformers.Siglip2Model:
    text = _text(projection_size=16, max_position_embeddings=12)
    vision = _vision(num_patches=16)
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    return scrambled(model)


def dinov2() -> transformers.Dinov2Model:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4, drop_path_rate=0.5
    )
    return scrambled(transformers.Dinov2Model(config))


def saved(model: Any, folder: Path, **preprocessor: Any) -> Path:
    """The model, its tokenizer and its preprocessor's config, as transformers saves them."""
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = {
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "resample": 3,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        **preprocessor,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def open_clip_state() -> dict[str, torch.Tensor]:
    """Random weights under OpenCLIP's names for its ViT-H/14: 16 heads of 2 numbers, in either tower."""
    generator = torch.Generator().manual_seed(1)
    width, hidden, projection = 32, 48, 12

    def draw(*shape: int, one: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3 + float(one)

    state = {
        "positional_embedding": draw(16, width),
        "text_projection": draw(width, projection),
        "logit_scale": torch.tensor(3.0),
        "token_embedding.weight": draw(VOCABULARY_SIZE, width),
        "ln_final.weight": draw(width, one=True),
        "ln_final.bias": draw(width),
        "visual.class_embedding": draw(width),
        "visual.positional_embedding": draw(17, width),
        "visual.proj": draw(width, projection),
        "visual.conv1.weight": draw(width, 3, 4, 4),
    }
    for name in ("visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": draw(width, one=True), f"{name}.bias": draw(width)}
    for tower, layers in (("visual.transformer", 3), ("transformer", 2)):
        for layer in range(layers):
            start = f"{tower}.resblocks.{layer}"
            for name in ("ln_1", "ln_2"):
                state |= {f"{start}.{name}.weight": draw(width, one=True), f"{start}.{name}.bias": draw(width)}
            state |= {
                f"{start}.attn.in_proj_weight": draw(3 * width, width),
                f"{start}.attn.in_proj_bias": draw(3 * width),
                f"{start}.attn.out_proj.weight": draw(width, width),
                f"{start}.attn.out_proj.bias": draw(width),
                f"{start}.mlp.c_fc.weight": draw(hidden, width),
                f"{start}.mlp.c_fc.bias": draw(hidden),
                f"{start}.mlp.c_proj.weight": draw(width, hidden),
                f"{start}.mlp.c_proj.bias": draw(width),
            }
    return state


def head_state(width: int) -> dict[str, torch.Tensor]:
    """A head as published: linear layers 0, 2, 4, 6 and 7, dropout between them."""
    generator = torch.Generator().manual_seed(2)
    sizes = {0: (width, 10), 2: (10, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}
    state = {}
    for layer, (takes, gives) in sizes.items():
        state[f"layers.{layer}.weight"] = torch.randn(gives, takes, generator=generator) * 0.5
        state[f"layers.{layer}.bias"] = torch.randn(gives, generator=generator) * 0.5
    return state


def blip() -> tuple[transformers.BlipVisionModel, transformers.BlipTextModel]:
    """Heads as in ImageReward: 16 for pictures, 12 for text."""
    vision = transformers.BlipVisionConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    text = transformers.BlipTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=24,
        encoder_hidden_size=32,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=12,
        max_position_embeddings=40,
        use_cache=False,
    )
    models = transformers.BlipVisionModel(vision), transformers.BlipTextModel(text, add_pooling_layer=False)
    return scrambled(models[0]), scrambled(models[1], seed=3)


def image_reward_state() -> dict[str, torch.Tensor]:
    """BLIP's weights under the names of ImageReward's own classes, and the head."""
    vision, text = blip()
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
        "post_layernorm": "norm",
    }
    state = {}
    for name, value in vision.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[f"blip.visual_encoder.{name}"] = value
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, 32)  # of pretraining: not used
    return state | {f"mlp.{name}": value for name, value in head_state(24).items()}
