"""How good pictures of captions are, beside scenes rendered for the same captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trimtab.assets import asset_path
from trimtab.benchmarks.figures import frechet_distance, gaussian_of
from trimtab.guidance import contrast, saturation
from trimtab.recipes.emoji_scenes import CATEGORIES, check_scene, parse_caption, sample_facts, sample_scene, summarize

__all__ = ["Scenes"]

RENDERS = 8
"""Scenes rendered for each caption."""
MIN_SCENES = 2048


class Scenes:
    """Rendered scenes: what pictures of the captions should look like.

    Eight are rendered for each caption, and scenes of other held-out captions, of all categories alike, bring their
    number to 2,048 at least. Fréchet distances are to all of these together.

    Args:
        captions: of the pictures to measure.

    Attributes:
        gaussian: of the scenes' features.
        saturation: for each caption the mean of its scenes, (N,).
        contrast: likewise.
        cell: the figures that perfect pictures would have: one more scene for each caption.
    """

    def __init__(self, captions: Sequence[str], device: Any = "cpu"):
        from transformers import CLIPModel

        self.captions = list(captions)
        self.device = device
        self._clip = CLIPModel.from_pretrained(asset_path("emoji-clip"), dtype=torch.float32).to(device).eval()
        rng = np.random.default_rng(0)
        facts = [parse_caption(caption) for caption in captions]
        others = max(0, self.number(len(facts)) - RENDERS * len(facts))
        told = [item for item in facts for _ in range(RENDERS)]
        told += [sample_facts(rng, CATEGORIES[i % len(CATEGORIES)], held_out=True) for i in range(others)]
        features, values = [], []
        for start in range(0, len(told), 256):
            images = _rendered(rng, told[start : start + 256])
            features.append(self.features(images))
            values.append(torch.stack([saturation(images), contrast(images)], 1))
        self.gaussian = gaussian_of(torch.cat(features))
        own = torch.cat(values)[: RENDERS * len(facts)].view(len(facts), RENDERS, 2).mean(1)
        self.saturation, self.contrast = own.T.tolist()
        self.cell = self.measure(_rendered(rng, facts))

    @staticmethod
    def number(num_captions: int) -> int:
        """How many scenes there are."""
        return max(MIN_SCENES, RENDERS * num_captions)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """emoji-clip's unit image embeddings (N, 128) of pictures (N, 3, H, W) in [0, 1]."""
        if images.shape[-2:] != (128, 128):
            images = functional.interpolate(images, (128, 128), mode="bicubic", antialias=True).clamp(0, 1)
        hidden = self._clip.vision_model(pixel_values=images.to(self.device) * 2 - 1).pooler_output
        return functional.normalize(self._clip.visual_projection(hidden), dim=1).cpu()

    def measure(self, images: torch.Tensor) -> dict[str, Any]:
        """The figures of one picture for each caption, (N, 3, H, W) in [0, 1]."""
        verdicts = check_scene(images, self.captions)
        values = {"saturation": saturation(images), "contrast": contrast(images)}
        return {
            "match": sum(verdict.correct for verdict in verdicts) / len(verdicts),
            **{name: value.mean().item() for name, value in values.items()},
            "frechet": frechet_distance(self.features(images), self.gaussian),
            "categories": summarize(verdicts),
            "pictures": {
                "right": "".join(str(int(verdict.correct)) for verdict in verdicts),
                **{name: [round(v, 4) for v in value.tolist()] for name, value in values.items()},
            },
        }


def _rendered(rng: np.random.Generator, facts: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample_scene(rng, item).render() for item in facts])).permute(0, 3, 1, 2)
