"""How well a picture fits its prompt by CLIP, SigLIP or SigLIP 2: whatever transformers loads of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import RewardModel, Tokenize, model_max_length
from .resize import Preprocessing, read_preprocessing, resize

__all__ = ["CLIPReward"]

_KINDS = ("clip", "siglip", "siglip2")
_KEPT_TEXTS = 1024


class CLIPReward(RewardModel):
    """The model's own logit of picture and prompt: s cos(image, text), for SigLIP plus its bias.

    For CLIP and with `scaled=False` it is the cosine alone. The text's features are computed once for each prompt
    and kept.

    Args:
        model: `CLIPModel`, `SiglipModel` or `Siglip2Model`; it is frozen here.
        tokenizer: the model's.
        preprocessing: from pictures to the model's input.
        name: in reports.
        scaled: multiply by exp(`logit_scale`) and add `logit_bias` where the model has one.
        max_num_patches: of `Siglip2Model`, whose pictures keep their aspect ratio.

    Raises:
        ValueError: for a model of another kind.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        name: str = "clip",
        scaled: bool = True,
        max_num_patches: int = 256,
    ) -> None:
        super().__init__()
        self.kind = model.config.model_type
        if self.kind not in _KINDS:
            raise ValueError(f"`model` is a {type(model).__name__}; takes a model of type {', '.join(_KINDS)}")
        self.model = model
        self.preprocessing = preprocessing
        self.name = name
        self.scaled = scaled
        self.max_num_patches = max_num_patches
        length = model_max_length(tokenizer, model.config.text_config.max_position_embeddings)
        siglip = self.kind != "clip"  # trained on texts padded to the full length, the padding not masked
        self.tokenize = Tokenize(tokenizer, length, padding="max_length" if siglip else True, attention_mask=not siglip)
        self._texts: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.freeze()

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        processor: str | None = None,
        **options: Any,
    ) -> CLIPReward:
        """Loads a model in transformers' layout, its weights from safetensors.

        Args:
            source: a folder or a Hub id.
            device: where it runs.
            dtype: of its weights.
            processor: folder or Hub id of tokenizer and preprocessing, if not `source`.
            options: of the constructor.

        Raises:
            ValueError: for a model of another kind.
            OSError: if files are missing.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in _KINDS:
            raise ValueError(f"`source` is {source!r}, a model of type {kind!r}; takes one of {', '.join(_KINDS)}")
        model = AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(processor or source)
        config = read_preprocessing(processor or source)
        if "max_num_patches" in config:
            options.setdefault("max_num_patches", config["max_num_patches"])
        return cls(model, tokenizer, Preprocessing.from_config(config), **options).to(device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32; see the class."""
        image = normalize(self.image_features(images), dim=-1)
        cosine = (image * self.text_features(prompts)).sum(-1)
        if not self.scaled:
            return cosine
        bias = getattr(self.model, "logit_bias", None)
        logits = cosine * self.model.logit_scale.float().exp()
        return logits if bias is None else logits + bias.float()

    def image_features(self, images: Tensor) -> Tensor:
        """Projected features (B, D), float32, of pictures (B, 3, H, W) in [0, 1]."""
        return self.model.get_image_features(**self._inputs(images)).pooler_output.float()

    def image_and_patch_features(self, images: Tensor, depths: Sequence[float]) -> list[Tensor]:
        """Projected features, and mean patch tokens after shares of the layers, of the same pass.

        Args:
            images: (B, 3, H, W) in [0, 1].
            depths: in (0, 1]; rounded to whole layers.

        Returns:
            (B, D) and for each depth (B, hidden width), float32.

        Raises:
            ValueError: a depth out of range.
        """
        if not all(0 < depth <= 1 for depth in depths):
            raise ValueError(f"`depths` are {tuple(depths)}; takes shares of the layers in (0, 1]")
        inputs = self._inputs(images)
        found = self.model.get_image_features(**inputs, output_hidden_states=True)
        layers = len(found.hidden_states) - 1
        tokens = [found.hidden_states[max(1, round(depth * layers))].float() for depth in depths]
        if self.kind == "siglip2":  # short pictures are padded with tokens that mean nothing
            mask = inputs["pixel_attention_mask"][..., None].float()
            means = [(part * mask).sum(1) / mask.sum(1) for part in tokens]
        else:
            means = [part[:, self.kind == "clip" :].mean(1) for part in tokens]
        return [found.pooler_output.float(), *means]

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        if self.kind == "siglip2":
            return self._patches(images)
        return {"pixel_values": self.preprocessing(images).to(self.model.dtype)}

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Projected features of length 1, (B, D), float32, of prompts."""
        device, dtype = self.model.device, self.model.dtype
        new = [text for text in dict.fromkeys(prompts) if (text, device, dtype) not in self._texts]
        if new:
            if len(self._texts) > _KEPT_TEXTS:
                self._texts.clear()
                new = list(dict.fromkeys(prompts))
            features = self.model.get_text_features(**self.tokenize(new, device)).pooler_output.float()
            rows = normalize(features, dim=-1).unbind()
            self._texts |= {(text, device, dtype): row for text, row in zip(new, rows, strict=True)}
        return torch.stack([self._texts[text, device, dtype] for text in prompts])

    def _patches(self, images: Tensor) -> dict[str, Tensor]:
        """Inputs of SigLIP 2 with flexible sizes: the picture's patches, aspect ratio kept."""
        side, count = self.model.config.vision_config.patch_size, self.max_num_patches
        height, width = _largest_size(images.shape[2], images.shape[3], side, count)
        x = resize(images.float(), (height, width), self.preprocessing.mode)
        x = Preprocessing(None, None, self.preprocessing.mean, self.preprocessing.std)(x)
        rows, columns = height // side, width // side
        x = (
            x.unflatten(3, (columns, side))
            .unflatten(2, (rows, side))
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3)
            .flatten(1, 2)
        )
        x = torch.nn.functional.pad(x, (0, 0, 0, count - rows * columns))
        mask = (torch.arange(count, device=x.device) < rows * columns).long().expand(len(x), -1)
        shapes = torch.tensor([[rows, columns]], device=x.device).expand(len(x), -1)
        return {
            "pixel_values": x.to(self.model.dtype),
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }


def _largest_size(height: int, width: int, patch: int, count: int) -> tuple[int, int]:
    """The largest size, in whole patches rounded up, of a scaled picture with at most `count` patches."""

    def scaled(scale: float) -> tuple[int, int]:
        return tuple(max(1, math.ceil(scale * side / patch)) for side in (height, width))

    low, high = 0.0, 100.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(scaled(middle)) <= count else (low, middle)
    rows, columns = scaled(low)
    return rows * patch, columns * patch
