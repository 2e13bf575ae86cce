"""How like a reference picture a picture is, by the features of CLIP or DINOv2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .base import RewardModel
from .resize import Preprocessing, read_preprocessing

__all__ = ["ImageSimilarityReward"]


class ImageSimilarityReward(RewardModel):
    """cos(features of the picture, features of the reference), the mean over several references.

    Features are the projected ones of models with text (CLIP, SigLIP) and the pooled first token of models of
    pictures alone (DINOv2). It ignores the prompt.

    Args:
        model: a model of transformers; it is frozen here.
        preprocessing: from pictures to the model's input.
        reference: one or more pictures: PIL, or a tensor (3, H, W) or (R, 3, H, W) in [0, 1].

    Raises:
        TypeError: if `reference` is neither.
        ValueError: if it has another shape.
    """

    name = "similarity"

    def __init__(self, model: Any, preprocessing: Preprocessing, reference: Any) -> None:
        super().__init__()
        self.model, self.preprocessing = model, preprocessing
        self.freeze()
        with torch.no_grad():
            features = [self.features(picture.to(model.device)) for picture in _pictures(reference)]
        self.register_buffer("reference", torch.cat(features))

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        reference: Any,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ImageSimilarityReward:
        """Loads a model in transformers' layout, its weights from safetensors.

        Args:
            source: folder or Hub id, such as `facebook/dinov2-base`.
            reference: as in the constructor.
            device: where it runs.
            dtype: of its weights.
        """
        from transformers import AutoModel

        model = AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True).to(device)
        return cls(model, Preprocessing.from_config(read_preprocessing(source)), reference).to(device)

    def features(self, images: Tensor) -> Tensor:
        """Features of length 1, (B, D) float32, of pictures (B, 3, H, W) in [0, 1]."""
        pixels = self.preprocessing(images).to(self.model.dtype)
        get = getattr(self.model, "get_image_features", self.model)
        return normalize(get(pixel_values=pixels).pooler_output.float(), dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,); see the class."""
        return (self.features(images) @ self.reference.float().t()).mean(1)


def _pictures(reference: Any) -> list[Tensor]:
    """Each (1, 3, H, W) or (R, 3, H, W), float32."""
    if isinstance(reference, Tensor):
        batch = reference if reference.ndim == 4 else reference[None]
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
            raise ValueError(f"`reference` has shape {tuple(reference.shape)}; takes (3, H, W) or (R, 3, H, W)")
        return [batch.float()]
    items = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if not items or not all(isinstance(item, Image.Image) for item in items):
        raise TypeError(f"`reference` is a {type(reference).__name__}; takes PIL images or a tensor in [0, 1]")
    arrays = [np.asarray(item.convert("RGB"), np.float32) / 255.0 for item in items]
    return [torch.from_numpy(array).permute(2, 0, 1)[None] for array in arrays]
