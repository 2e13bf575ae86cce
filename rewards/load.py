"""Rewards by their names, from folders and from the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .aesthetic import AestheticReward
from .base import RewardModel
from .clip import CLIPReward
from .function import CallableReward
from .hps import HPSReward
from .image_reward import ImageReward
from .personal import MARK, PersonalReward
from .state_dict import write_weights
from .weighted import PRESETS, WeightedReward

__all__ = ["REWARDS", "load_reward", "save_weights", "weights_folder"]

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
_CONVERTED = {  # published as pickles: name, class, where they are, the entry that holds the weights
    "hpsv2.1": (HPSReward, "xswu/HPSv2, HPS_v2.1_compressed.pt", '["state_dict"]'),
    "imagereward": (ImageReward, "zai-org/ImageReward, ImageReward.pt", ""),
    "aesthetic": (AestheticReward, "sac+logos+ava1-l14-linearMSE.pth of improved-aesthetic-predictor", ""),
}
_MARKS = {
    "visual.conv1.weight": "hpsv2.1",
    "blip.visual_encoder.cls_token": "imagereward",
    "layers.0.weight": "aesthetic",
}


def load_reward(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> RewardModel:
    """Loads a reward, from safetensors alone.

    Args:
        source: one of the names in `REWARDS`; a folder or a Hub id of a CLIP, SigLIP or SigLIP 2 model in
            transformers' layout; a safetensors file, or a folder with one, of HPSv2.1, ImageReward or the aesthetic
            head with their published names, which tell them apart; a personal reward's file. A folder's own tokenizer
            is used.
        device: where it runs; None is the CPU.
        dtype: of its weights; the values are float32.
        options: of the reward's own loader, such as `tokenizer` for HPSv2.1 and ImageReward, `clip` for the aesthetic
            predictor, `processor` and `scaled` for CLIP.

    Returns:
        The reward.

    Raises:
        ValueError: for a name that is none, or weights of something else.
        FileNotFoundError: for a reward published as a pickle that was not converted yet; the message says how.
        OSError: if the Hub can't be reached or has no such model.

    Example:
        >>> reward = load_reward("bundled")
        >>> reward(torch.zeros(1, 3, 128, 128), "a cat on a sky background").shape
        torch.Size([1])
    """
    if isinstance(source, Path):
        source = str(source)
    if not isinstance(source, str) or not source:
        raise ValueError(f"`source` is {source!r}; takes a name, a folder or a Hub id")
    if source in REWARDS:
        return REWARDS[source](device=device, dtype=dtype, **options)
    path = Path(source).expanduser()
    if path.exists():
        return _from_path(path, device, dtype, options)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"`source` is {source!r}; takes {', '.join(REWARDS)}, a folder, or a Hub id like owner/name")
    return CLIPReward.from_pretrained(source, device=device, dtype=dtype, **options)


def weights_folder() -> Path:
    """Where converted weights are looked for: `TRIMTAB_REWARDS`, or `trimtab/rewards` in Hugging Face's own cache."""
    from huggingface_hub.constants import HF_HOME

    given = os.environ.get("TRIMTAB_REWARDS")
    return Path(given).expanduser() if given else Path(HF_HOME) / "trimtab" / "rewards"


def save_weights(name: str, state: dict[str, Tensor], folder: str | Path | None = None) -> Path:
    """Writes the weights of a reward that is published as a pickle to where `load_reward(name)` finds them.

    Reading the pickle is left to you, who know where it is from:

        state = torch.load("HPS_v2.1_compressed.pt", map_location="cpu", weights_only=True)["state_dict"]
        save_weights("hpsv2.1", state)

    Args:
        name: "hpsv2.1", "imagereward" or "aesthetic".
        state: weights under their published names.
        folder: where to; None is `weights_folder()`.

    Returns:
        The file's path.

    Raises:
        ValueError: for another name or weights of something else.
    """
    if name not in _CONVERTED:
        raise ValueError(f"`name` is {name!r}; takes one of {', '.join(_CONVERTED)}")
    if _kind(set(state)) != name:
        raise ValueError(f"`state` has the names {', '.join(sorted(state)[:3])} …, which are not those of {name}")
    target = (weights_folder() if folder is None else Path(folder)) / f"{name}.safetensors"
    write_weights(state, target)
    return target


def _from_path(path: Path, device: Any, dtype: torch.dtype, options: dict[str, Any]) -> RewardModel:
    if path.is_dir() and (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "model_type" in config:
            return CLIPReward.from_pretrained(str(path), device=device, dtype=dtype, **options)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        raise ValueError(f"`source` is {str(path)!r}; takes a folder with a config.json or one .safetensors file")
    names = _names(files[0])
    if MARK in names:
        return PersonalReward.from_weights(files[0], device=device, dtype=dtype, **options)
    kind = _kind(names)
    if kind is None:
        raise ValueError(f"`source` is {str(path)!r}, whose weights are of none of {', '.join(_CONVERTED)}")
    if (files[0].parent / "tokenizer_config.json").is_file() and kind != "aesthetic":
        options.setdefault("tokenizer", str(files[0].parent))
    return _CONVERTED[kind][0].from_weights(str(files[0]), device=device, dtype=dtype, **options)


def _names(path: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ValueError(f"`source` is {str(path)!r}; takes a .safetensors file, never a pickle: see save_weights")
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"`source` is {str(path)!r}, no whole safetensors file: {error}") from None


def _kind(names: set[str]) -> str | None:
    return next((kind for mark, kind in _MARKS.items() if mark in names), None)


def _bundled(**options: Any) -> RewardModel:
    from trimtab.assets import asset_path

    return CLIPReward.from_pretrained(str(asset_path("emoji-clip")), **{"name": "bundled", **options})


def _right_share(device: Any = None, dtype: Any = None) -> RewardModel:
    """What `check_scene` finds right of a caption of the bundled model, without a gradient; it has no weights."""
    from trimtab.recipes.emoji_scenes import check_scene

    def share(images: Tensor, prompts: list[str]) -> list[float]:
        return [verdict.right_share for verdict in check_scene(images.float(), prompts)]

    return CallableReward(share, name="right-share")


def _clip(**options: Any) -> RewardModel:
    return CLIPReward.from_pretrained(CLIP_H, **options)


def _pickscore(**options: Any) -> RewardModel:
    """Kirstain et al., "Pick-a-Pic", arXiv 2305.01569: s cos by a tuned ViT-H/14; the processor is the original's."""
    return CLIPReward.from_pretrained(PICKSCORE, **{"name": "pickscore", "processor": CLIP_H, **options})


def _converted(name: str) -> Callable[..., RewardModel]:
    def load(**options: Any) -> RewardModel:
        cls, published, entry = _CONVERTED[name]
        path = weights_folder() / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there. {name} is published as a pickle ({published}), which is not read here; convert "
                f"it once: trimtab.rewards.save_weights({name!r}, torch.load(FILE, map_location='cpu', "
                f"weights_only=True){entry})"
            )
        return cls.from_weights(str(path), **options)

    return load


def _preset(name: str) -> Callable[..., RewardModel]:
    return lambda **options: WeightedReward(PRESETS[name], name=name, **options)


REWARDS: dict[str, Callable[..., RewardModel]] = {
    "bundled": _bundled,
    "right-share": _right_share,
    "clip": _clip,
    "pickscore": _pickscore,
    **{name: _converted(name) for name in _CONVERTED},
    **{name: _preset(name) for name in PRESETS},
}
