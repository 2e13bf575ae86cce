"""Small random models laid out as published repositories are: their index and configs, other sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trimtab.benchmarks.full_size_networks import PUBLISHED, Layout, make_network

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "CLIPTextModel": CLIP | {"projection_dim": 32},
    "CLIPTextModelWithProjection": CLIP | {"projection_dim": 32},
    "T5EncoderModel": {"d_model": 64, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1},
    "UNet2DConditionModel": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 4, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "SD3Transformer2DModel": {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "num_layers": 3,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "FluxTransformer2DModel": {
        "num_attention_heads": 1,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
    },
    "QwenImageTransformer2DModel": {"num_attention_heads": 1, "num_layers": 1, "joint_attention_dim": 256},
    "AutoencoderKL": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    "AutoencoderKLQwenImage": {"base_dim": 8},
}
QWEN_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 300,
    "bos_token_id": 298,
    "eos_token_id": 299,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [0],
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_layout(name: str, folder: Path, *, weights: bool = True) -> Path:
    """Writes a published repository in small, with weights in several files as the large ones have them.

    Args:
        name: of a folder in `benchmarks/published`.
        folder: a new one.
        weights: random ones too, and tokenizers of letters.

    Returns:
        The folder.
    """
    shutil.copytree(PUBLISHED / name, folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for component, (_, cls) in ((key, entry) for key, entry in index.items() if isinstance(entry, list) and entry[1]):
        path = folder / component / "config.json"
        if path.is_file():
            path.write_text(json.dumps(_shrunk(json.loads(path.read_text(encoding="utf-8")), cls)), encoding="utf-8")
        elif weights and "Tokenizer" in cls:
            _write_tokenizer(folder / component, cls)
    if weights:
        _write_weights(Layout(folder))
    return folder


def _shrunk(config: dict[str, Any], cls: str) -> dict[str, Any]:
    if cls == "Qwen2_5_VLForConditionalGeneration":
        parts = {
            "text_config": config["text_config"] | QWEN_TEXT,
            "vision_config": config["vision_config"] | QWEN_VISION,
        }
        return config | QWEN_TEXT | parts
    config = config | SIZES[cls]
    if config.get("dual_attention_layers"):
        config["dual_attention_layers"] = [0, 1]
    if "vocab_size" in config:
        config["vocab_size"] = 64
    return config


def _write_weights(layout: Layout) -> None:
    for name in layout.networks:
        path = layout.folder / name / "config.json"
        config = path.read_text(encoding="utf-8")
        torch.manual_seed(0)
        network = make_network(layout, name, "cpu", torch.float32)
        network.save_pretrained(layout.folder / name, max_shard_size="150KB" if name == layout.denoiser else "1GB")
        path.write_text(config, encoding="utf-8")  # the published one, not as this version writes it


def _write_tokenizer(folder: Path, cls: str) -> None:
    if cls == "T5TokenizerFast":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.save(str(folder / "tokenizer.json"))
        return
    if cls == "CLIPTokenizer":
        words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    else:
        words = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
