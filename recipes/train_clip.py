"""Step 2 of the bundled model: emoji-clip, which tells how well a picture fits a caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from .emoji_scenes.alteration import alter_facts
from .emoji_scenes.captions import SceneFacts, write_caption
from .emoji_scenes.layout import sample_facts, sample_scene
from .text import build_tokenizer, clip_text_config
from .training_loop import TrainingSettings, train

GROUP = 4
"""A scene and three that differ from it in one attribute each stand in the same batch."""


def build_clip(width: int = 128) -> CLIPModel:
    """An untrained ``CLIPModel`` for 128x128 pictures."""
    vision = CLIPVisionConfig(
        image_size=128,
        patch_size=16,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        projection_dim=width,
        hidden_act="gelu",
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=clip_text_config(width),
            vision_config=vision,
            projection_dim=width,
            logit_scale_init_value=2.7,
        )
    )
    model.text_model.embeddings.token_embedding.weight.data.normal_(std=0.5)
    return model


def build_image_processor() -> CLIPImageProcessor:
    """Resizes to 128x128 and maps [0, 1] to [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": 128},
        crop_size={"height": 128, "width": 128},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


class ContrastiveLoss(nn.Module):
    """Cross entropy of matching pictures and captions in a batch, both ways; equal facts count as matches."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Takes images (B, 3, 128, 128) in [-1, 1], ids and mask (B, 16), and which pairs state the same (B, B) float.

        Returns:
            the loss and the fraction of pictures whose best caption states the same, each a scalar.
        """
        output = self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=images)
        logits = output.logits_per_image.float()
        target = same / same.sum(1, keepdim=True)
        loss = 0.5 * (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.t(), target))
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return loss, right


def draw_pairs(rng: np.random.Generator, count: int, held_out: bool = False) -> tuple[Tensor, list[str], Tensor]:
    """Pictures and captions in groups of :data:`GROUP`.

    Half of the scenes lie on the layouts' grid, and pictures get a little noise, so that pictures of a generator and of
    an editor are judged as well as clean ones.

    Returns:
        images (count, 3, 128, 128) in [-1, 1], captions, and which pairs state the same (count, count), float32.
    """
    facts: list[SceneFacts] = []
    while len(facts) < count:
        first = sample_facts(rng, held_out=held_out)
        others = [alter_facts(first, rng) for _ in range(GROUP - 1)]
        facts += [first, *(other for other in others if other.is_held_out() == held_out)]
    facts = facts[:count]
    images = np.stack([sample_scene(rng, item, grid=8 if rng.random() < 0.5 else 1).render() for item in facts])
    images += rng.normal(size=images.shape).astype(np.float32) * rng.uniform(0, 0.06, (count, 1, 1, 1)).astype(
        np.float32
    )
    told = [min(write_caption(item), write_caption(item.seen_from_second())) for item in facts]
    _, index = np.unique(told, return_inverse=True)
    same = torch.from_numpy((index[:, None] == index[None, :]).astype(np.float32))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).mul_(2.0).sub_(1.0)
    return pixels.contiguous(), [write_caption(item) for item in facts], same


def train_clip(clip: CLIPModel, settings: TrainingSettings, folder: Path, *, max_seconds: float | None) -> bool:
    """Trains ``clip`` on groups of scenes that differ in one attribute.

    Returns:
        Whether all steps are done.
    """
    tokenizer = build_tokenizer()

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([settings.seed, 1, draw])
        images, captions, same = draw_pairs(rng, settings.batch_size)
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
        tensors = (images, tokens.input_ids, tokens.attention_mask, same)
        loss, right = prepared(*(tensor.to(device) for tensor in tensors))
        return loss, {"right": right.detach()}

    return train(ContrastiveLoss(clip), loss_of_step, settings, folder, max_seconds=max_seconds)


@torch.no_grad()
def measure_clip(clip: CLIPModel, count: int = 400, seed: int = 321) -> float:
    """How often a held-out scene fits its caption better than the caption made wrong in one attribute, in [0, 1]."""
    tokenizer, rng, right = build_tokenizer(), np.random.default_rng(seed), 0
    for _ in range(count):
        facts = sample_facts(rng, held_out=True)
        image = torch.from_numpy(sample_scene(rng, facts).render()).permute(2, 0, 1)[None] * 2.0 - 1.0
        captions = [write_caption(facts), write_caption(alter_facts(facts, rng))]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
        logits = clip(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=image
        ).logits_per_image
        right += int(logits[0, 0] > logits[0, 1])
    return right / count
