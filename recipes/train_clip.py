"""Step 2 of the bundled model: emoji-clip, which tells how well a picture fits a caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from .emoji_scenes.alteration import alter_facts
from .emoji_scenes.breakage import break_scene
from .emoji_scenes.captions import SceneFacts, write_caption
from .emoji_scenes.layout import sample_facts, sample_scene
from .text import build_tokenizer, clip_text_config
from .training_loop import TrainingSettings, adamw, train

GROUP = 4
"""A scene and three that differ from it in one attribute each stand in the same batch."""
CATEGORY_SHARES = {"one": 0.2, "count": 0.36, "left_right": 0.22, "above_below": 0.22}


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
    """Cross entropy of matching pictures and captions in a batch, both ways; equal facts count as matches.

    Broken pictures stand among those that a caption chooses from, and match none.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Takes (B + K, 3, 128, 128) images in [-1, 1], the last K broken, and for the others ids and mask, (B, 16).

        Args:
            images: see above.
            input_ids: of the captions.
            attention_mask: of the captions.
            same: (B, B) float, 1 where two of them state the same.

        Returns:
            the loss and the fraction of captions whose best picture states the same, each a scalar.
        """
        logits = self.clip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=images).logits_per_text
        logits, whole = logits.float(), logits[:, : len(same)].float()
        target = same / same.sum(1, keepdim=True)
        of_captions = functional.cross_entropy(logits, functional.pad(target, (0, len(images) - len(same))))
        loss = 0.5 * (of_captions + functional.cross_entropy(whole.t(), target))
        best = functional.pad(same, (0, len(images) - len(same))).gather(1, logits.argmax(1, keepdim=True))
        return loss, best.mean()


def draw_pairs(
    rng: np.random.Generator, count: int, held_out: bool = False, *, broken: int = 0
) -> tuple[Tensor, list[str], Tensor]:
    """Pictures and captions in groups of :data:`GROUP`, and broken pictures.

    Half of the scenes lie on the layouts' grid, and pictures are blurred a little and get a little noise, so that
    pictures of a generator and of an editor are judged as well as clean ones.

    Returns:
        images (count + broken, 3, 128, 128) in [-1, 1], where number ``count + i`` is another picture of caption ``i``
        with an object broken; captions; and which pairs state the same (count, count), float32.
    """
    facts: list[SceneFacts] = []
    while len(facts) < count:
        category = str(rng.choice(list(CATEGORY_SHARES), p=list(CATEGORY_SHARES.values())))
        first = sample_facts(rng, category, held_out=held_out)
        of_count = ["count"] if category == "count" else [None]
        others = [alter_facts(first, rng, kind) for kind in (*of_count, *[None] * (GROUP - 2))]
        facts += [first, *(other for other in others if other.is_held_out() == held_out)]
    facts = facts[:count]
    grids = [8 if rng.random() < 0.5 else 1 for _ in range(count + broken)]
    images = [sample_scene(rng, item, grid=grid).render() for item, grid in zip(facts, grids, strict=False)]
    images += [
        break_scene(sample_scene(rng, item, grid=grid), rng)
        for item, grid in zip(facts[:broken], grids[count:], strict=False)
    ]
    told = [min(write_caption(item), write_caption(item.seen_from_second())) for item in facts]
    _, index = np.unique(told, return_inverse=True)
    same = torch.from_numpy((index[:, None] == index[None, :]).astype(np.float32))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return degrade(pixels, rng).mul_(2.0).sub_(1.0), [write_caption(item) for item in facts], same


def degrade(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, H, W), each blurred by up to 1.5 pixels and with noise of up to 0.06."""
    offsets = torch.arange(-4, 5.0)
    sigmas = torch.from_numpy(rng.uniform(0.2, 1.5, len(pixels)).astype(np.float32))
    kernels = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    rows = functional.pad(pixels.flatten(0, 1)[None], (4, 4, 4, 4), mode="replicate")
    rows = functional.conv2d(rows, kernels[..., None], groups=kernels.shape[0])
    rows = functional.conv2d(rows, kernels[:, :, None], groups=kernels.shape[0])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(pixels.shape, generator=generator)
    strength = torch.from_numpy(rng.uniform(0, 0.06, (len(pixels), 1, 1, 1)).astype(np.float32))
    return rows.view_as(pixels).add(noise.mul_(strength))


def train_clip(clip: CLIPModel, settings: TrainingSettings, folder: Path, *, max_seconds: float | None) -> bool:
    """Trains ``clip`` on groups of scenes that differ in one attribute, with as many broken pictures.

    The matrices of its layers by Muon, all else by AdamW.

    Returns:
        Whether all steps are done.
    """
    tokenizer = build_tokenizer()

    def loss_of_step(
        prepared: nn.Module, step: int, draw: int, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([settings.seed, 1, draw])
        images, captions, same = draw_pairs(rng, settings.batch_size, broken=settings.batch_size)
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
        tensors = (images, tokens.input_ids, tokens.attention_mask, same)
        loss, right = prepared(*(tensor.to(device) for tensor in tensors))
        return loss, {"right": right.detach()}

    module = ContrastiveLoss(clip)
    matrices = {name: p for name, p in module.named_parameters() if ".layers." in name and p.ndim == 2}
    rest = ((name, p) for name, p in module.named_parameters() if name not in matrices)
    muon = torch.optim.Muon(
        matrices.values(), settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    optimizers = [muon, adamw(rest, settings)]
    return train(module, loss_of_step, settings, folder, max_seconds=max_seconds, optimizers=optimizers)


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
