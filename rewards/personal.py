"""A person's own taste as a reward: a small head on frozen features, fitted from likes and dislikes or from pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trimtab.optim.checks import checked_choice, checked_generator, checked_number

from .base import RewardModel
from .clip import CLIPReward
from .personal_features import FeatureSpace, feature_count, person_features, picture_features
from .personal_fit import HEADS, fit_head
from .personal_votes import checked_votes
from .state_dict import write_weights

__all__ = ["FeatureSpace", "PersonalReward", "fit_personal_reward", "picture_features"]

FORMAT = "trimtab.personal.2"
MARK = "personal.mean"
"""The name by which a file's weights are known to be such a reward's."""


class PersonalReward(RewardModel):
    """head(z(picture)) on the features of a frozen CLIP model; in log odds of liking. It ignores the prompt.

    Made by `fit_personal_reward`, saved by `save`, loaded by `load_reward("taste.safetensors")`.

    Args:
        clip: the model whose features of pictures are used.
        space: from features to the head's inputs.
        head: Linear, or Linear, ReLU, Linear, to one output.
        source: name, folder or Hub id that `load_reward` finds `clip` by.
        name: in reports.

    Example:
        >>> from trimtab.rewards import load_reward
        >>> pictures = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> pictures[:4, 0] += 1; pictures.clamp_(0, 1)[:, :1].mean() > 0.5
        tensor(True)
        >>> taste = fit_personal_reward(pictures, liked=[True] * 4 + [False] * 4, head="linear")
        >>> values = taste(pictures, "")
        >>> bool(values[:4].min() > values[4:].max())
        True
    """

    def __init__(
        self, clip: CLIPReward, space: FeatureSpace, head: nn.Module, *, source: str = "bundled", name: str = "personal"
    ) -> None:
        super().__init__()
        self.clip, self.head, self.source, self.name = clip, head, source, name
        self.register_buffer("mean", space.mean)
        self.register_buffer("basis", space.basis)
        self.register_buffer("scale", space.scale)
        self.freeze()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32; see the class."""
        return self.score_features(person_features(self.clip, images))

    def score_features(self, features: Tensor) -> Tensor:
        """(B,) of features (B, D) of length 1, which `picture_features` gives."""
        return self.head(FeatureSpace(self.mean, self.basis, self.scale)(features))[:, 0]

    def save(self, path: str | Path) -> Path:
        """Writes the head and its feature space, a few kilobytes, without the CLIP model.

        Raises:
            ValueError: for a name that does not end in .safetensors.
        """
        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise ValueError(f"`path` is {str(path)!r}; takes a name that ends in .safetensors")
        state = {MARK: self.mean, "personal.basis": self.basis, "personal.scale": self.scale}
        state |= {f"personal.head.{key}": value for key, value in self.head.state_dict().items()}
        about = {"format": FORMAT, "features": self.source, "name": self.name}
        write_weights(state, path, about)
        return path

    @classmethod
    def from_weights(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        features: str | CLIPReward | None = None,
    ) -> PersonalReward:
        """Loads what `save` wrote.

        Args:
            path: the file.
            device: where it runs.
            dtype: of the CLIP model; the head stays float32.
            features: the CLIP reward, or its name, in place of the one that the file names.

        Raises:
            ValueError: for a file of something else, a damaged one, or features of another width.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"`path` is {str(path)!r}, no whole safetensors file: {error}") from None
        if about.get("format") != FORMAT or MARK not in state:
            raise ValueError(f"`path` is {str(path)!r}, which has the format {about.get('format')!r}; takes {FORMAT!r}")
        space, head = _parts_of(state)
        source = about.get("features", "bundled") if features is None else features
        clip, source = _clip_of(source, device, dtype)
        if feature_count(clip) != len(space.mean):
            raise ValueError(
                f"`features` gives {feature_count(clip)} numbers a picture; the reward was fitted on {len(space.mean)}"
            )
        return cls(clip, space, head, source=source, name=about.get("name", "personal")).to(device)


def fit_personal_reward(
    pictures: Tensor,
    *,
    liked: Sequence[bool] | Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    head: Literal["polished", "linear", "robust"] = "polished",
    features: str | CLIPReward = "bundled",
    width: int = 16,
    decay: float | None = None,
    epsilon: float = 0.02,
    name: str = "personal",
    generator: torch.Generator | None = None,
) -> PersonalReward:
    """Fits a person's taste.

    A picture's features are the frozen model's projected ones beside the mean patch tokens of two inner layers, all of
    one length. They are centred and turned to their principal directions. On these:

    - "polished": a network of 32 ReLUs trained by AdamW for a short while, then moved to the optimum over its own
      activation patterns (`trimtab.optim.polish`, arXiv 2201.01965), never above AdamW's objective.
    - "linear": logistic regression, or Bradley and Terry's model for pairs, by Newton's method (arXiv 2506.13710).
    - "robust": as "polished" by the convex adversarial program: the worst point of a box of radius `epsilon` around
      each picture in the head's inputs. It asks each neuron to keep its sign over every box, which few patterns of
      many pictures allow; larger radii are refused with the largest that is possible.

    Args:
        pictures: (N, 3, H, W) in [0, 1], or their features (N, D) of `trimtab.rewards.personal.picture_features`.
        liked: N booleans: likes and dislikes, both there.
        pairs: (m, 2) numbers of pictures, the preferred one first; in place of `liked`.
        head: see above.
        features: the frozen model: a name, folder or Hub id of a CLIP model for `load_reward`, or a `CLIPReward`.
        width: principal directions at most; never more than a quarter of the votes.
        decay: > 0, weight decay of the sum of the losses; None is 1 for the linear head, for the others a twentieth of
            the votes but 3 at most.
        epsilon: > 0, of "robust".
        name: in reports.
        generator: of the network's first weights; None is seed 0.

    Returns:
        The reward; `save` writes it.

    Raises:
        ValueError: only likes or only dislikes, fewer than four votes, a picture preferred to itself, pictures of
            which all have the same features, two votes that contradict each other on all pairs, features of another
            width than the model's, or values that are not finite.
    """
    checked_choice("head", head, HEADS)
    clip, source = _clip_of(features, None, torch.float32)
    space_of = _features_of(clip, pictures)
    votes = checked_votes(space_of, liked, pairs)
    width = max(1, min(width, len(votes.targets) // 4))
    space = FeatureSpace.of(space_of, width)
    if decay is not None:
        checked_number("decay", decay, above=0)
    checked_number("epsilon", epsilon, above=0)
    fitted = fit_head(space(space_of), votes, head, decay, epsilon, checked_generator(generator))
    return PersonalReward(clip, space, fitted.float(), source=source, name=name)


def _features_of(clip: CLIPReward, pictures: Any) -> Tensor:
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point() or pictures.ndim not in (2, 4):
        got = f"{pictures.dtype} {tuple(pictures.shape)}" if isinstance(pictures, Tensor) else type(pictures).__name__
        raise ValueError(f"`pictures` is {got}; takes floating (N, 3, H, W) in [0, 1] or features (N, D)")
    if not bool(torch.isfinite(pictures).all()):
        raise ValueError("`pictures` has values that are not finite")
    if pictures.ndim == 4:
        return picture_features(clip, pictures)
    if pictures.shape[1] != feature_count(clip):
        raise ValueError(
            f"`pictures` is features {tuple(pictures.shape)}; {clip.name!r} gives {feature_count(clip)} a picture"
        )
    return normalize(pictures.float(), dim=-1)


def _clip_of(features: str | CLIPReward, device: Any, dtype: torch.dtype) -> tuple[CLIPReward, str]:
    from .load import load_reward

    if isinstance(features, CLIPReward):
        return features, features.name
    clip = load_reward(features, device, dtype)
    if not isinstance(clip, CLIPReward):
        raise ValueError(f"`features` is {features!r}, a {type(clip).__name__}; takes a CLIP, SigLIP or SigLIP 2 model")
    return clip, str(features)


def _parts_of(state: dict[str, Tensor]) -> tuple[FeatureSpace, nn.Module]:
    """The space and the head of a file's weights, which anybody may have written."""
    missing = [name for name in ("personal.basis", "personal.scale") if name not in state]
    wrong = [name for name, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    if missing or wrong:
        named = ", ".join((missing or wrong)[:3])
        raise ValueError(f"the file's weights {'lack' if missing else 'are not finite numbers in'} {named}")
    mean, basis, scale = (state[name] for name in (MARK, "personal.basis", "personal.scale"))
    if mean.ndim != 1 or basis.ndim != 2 or len(basis) != len(mean) or scale.numel() != 1 or scale <= 0:
        shapes = ", ".join(str(tuple(value.shape)) for value in (mean, basis, scale))
        raise ValueError(f"the file's feature space has the shapes {shapes}; takes (D,), (D, d) and one number > 0")
    weights = {key.removeprefix("personal.head."): value for key, value in state.items() if ".head." in key}
    try:
        head = _head_of(weights)
        head(torch.zeros(1, basis.shape[1]))
    except (RuntimeError, KeyError, IndexError):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in weights.items())
        raise ValueError(f"the file's head does not fit {basis.shape[1]} numbers: {shapes[:200]}") from None
    return FeatureSpace(mean, basis, scale), head


def _head_of(weights: dict[str, Tensor]) -> nn.Module:
    """The head that weights belong to."""
    if "0.weight" in weights:
        first, last = weights["0.weight"], weights["2.weight"]
        head: nn.Module = nn.Sequential(
            nn.Linear(first.shape[1], len(first), bias="0.bias" in weights),
            nn.ReLU(),
            nn.Linear(last.shape[1], 1, bias="2.bias" in weights),
        )
    elif "weight" in weights:
        head = nn.Linear(weights["weight"].shape[1], 1, bias="bias" in weights)
    else:
        raise ValueError(f"the head's weights have the names {json.dumps(sorted(weights)[:4])}, which are no head's")
    head.load_state_dict(weights)
    return head
