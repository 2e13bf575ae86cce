"""How good a picture looks, whatever it shows: a linear head on CLIP's features of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .base import RewardModel
from .image_reward import linear_head
from .resize import Preprocessing, read_preprocessing
from .state_dict import read_weights

__all__ = ["AestheticReward"]

CLIP = "openai/clip-vit-large-patch14"


class AestheticReward(RewardModel):
    """The LAION aesthetic predictor: a head on the features, of length 1, of OpenAI's ViT-L/14; about 1 to 10.

    It ignores the prompt. Schuhmann, "improved-aesthetic-predictor" (2022), the head `sac+logos+ava1-l14-linearMSE`.

    Args:
        model: `CLIPModel`.
        head: features (B, D) to (B, 1).
        preprocessing: from pictures to the model's input.

    The models are frozen here.
    """

    name = "aesthetic"

    def __init__(self, model: Any, head: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.head, self.preprocessing = model, head, preprocessing
        self.freeze()

    @classmethod
    def from_weights(
        cls,
        path: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        clip: str = CLIP,
    ) -> AestheticReward:
        """Loads the published head, once it is a safetensors file (see `trimtab.rewards.save_weights`).

        Args:
            path: the file: names as in `sac+logos+ava1-l14-linearMSE.pth`.
            device: where it runs.
            dtype: of its weights.
            clip: folder or Hub id of the CLIP model.

        Raises:
            ValueError: if the weights are others.
            OSError: if CLIP's files are missing.
        """
        from transformers import CLIPModel

        head = linear_head({name: value.float() for name, value in read_weights(path).items()})
        model = CLIPModel.from_pretrained(clip, dtype=dtype, use_safetensors=True)
        wide, takes = head[0].in_features, model.config.projection_dim
        if wide != takes:
            raise ValueError(f"`clip` has features of {takes} numbers; takes a model with {wide}, as the head")
        preprocessing = Preprocessing.from_config(read_preprocessing(clip))
        return cls(model, head.to(dtype), preprocessing).to(device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,); see the class."""
        pixels = self.preprocessing(images).to(self.model.dtype)
        features = normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        return self.head(features.to(self.model.dtype))[:, 0]
