"""Rules that steer away from a weakened copy of the denoiser: PAG, SEG, skipped layers, autoguidance."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput  # noqa: F401  loading looks for it here

from .base import COND, UNCOND, WEAK, Guidance, Scale, check_finite
from .interception import redirect
from .perturbation import (
    Rows,
    attentions,
    blocks_of,
    chosen,
    identity_attention,
    middle_blocks,
    skip_block,
    smoothed_queries,
)

__all__ = [
    "AutoGuidance",
    "PerturbedAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
]


class _Weakened(Guidance):
    """Guidance with a third prediction, k: the conditional one of a weakened denoiser.

    g = u + w (c - u) + s (c - k)        g = c + s (c - k) at w = 1, where the unconditional half isn't needed
    """

    _input_predictions = [COND, UNCOND, WEAK]
    layers: list[int] | None = None
    weak_denoiser: torch.nn.Module | None = None

    def _init(
        self, guidance_scale: Scale, weak_scale: float, window: tuple[float, float], layers: Any, enabled: bool
    ) -> None:
        super().__init__(guidance_scale, enabled=enabled)
        check_finite("the scale of the weakened prediction", weak_scale, low=0.0)
        first, last = window
        check_finite("the start of the weakened prediction", first, low=0.0, high=1.0)
        check_finite("the stop of the weakened prediction", last, low=first, high=1.0)
        self.weak_scale, self.weak_window = weak_scale, window
        self.layers = None if layers is None else [layers] if isinstance(layers, int) else list(layers)
        if self.layers is not None and not (self.layers and all(isinstance(i, int) for i in self.layers)):
            raise ValueError(f"layers must be one or more block numbers, got {layers!r}")
        self._own_rows: Any = None
        self._undo_own: Callable[[], None] | None = None

    def perturb(self, block: torch.nn.Module, rows: Any) -> list[Callable[[], None]]:
        """Puts the perturbation into one block; returns what undoes it."""
        raise NotImplementedError

    def install(self, denoiser: torch.nn.Module, rows: Any) -> Callable[[], None]:
        if hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None:
            raise NotImplementedError(f"{type(self).__name__} changes layers inside: it can't be used compiled")
        blocks = middle_blocks(denoiser) if self.layers is None else chosen(blocks_of(denoiser), self.layers)
        undo = [step for block in blocks for step in self.perturb(block, rows)]

        def remove() -> None:
            for step in undo:
                step()

        if not undo:
            raise ValueError(f"{type(self).__name__} finds nothing to change in blocks {self.layers}")
        return remove

    @property
    def weakens(self) -> bool:
        """Whether this step takes the weakened prediction."""
        if not self._enabled or self.weak_scale == 0:
            return False
        if self._num_inference_steps is None:
            return True
        first, last = (int(share * self._num_inference_steps) for share in self.weak_window)
        return first <= self._step < last

    @property
    def wanted(self) -> list[str]:
        return [COND] + [UNCOND] * self.is_guided + [WEAK] * self.weakens

    @property
    def may_want(self) -> list[str]:
        return [COND] + [UNCOND] * self.guides + [WEAK] * (self._enabled and self.weak_scale != 0)

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_cond_skip: torch.Tensor | None = None,
    ) -> GuiderOutput:
        pred = pred_cond
        if pred_uncond is not None and self.is_guided:
            pred = pred_uncond + self.scale * (pred_cond - pred_uncond)
        if pred_cond_skip is not None and self.weakens:
            pred = pred + self.weak_scale * (pred_cond - pred_cond_skip)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # Modular pipelines call the denoiser once for each prediction, between these two.

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self.wanted[self._count_prepared - 1] != WEAK:
            return
        if self.weak_denoiser is not None:
            self._undo_own = redirect(denoiser, self.weak_denoiser)
        else:
            self._undo_own = self.install(denoiser, Rows(start=0, total=1))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._undo_own is not None:
            self._undo_own()
            self._undo_own = None

    @property
    def is_conditional(self) -> bool:
        return self.wanted[max(self._count_prepared, 1) - 1] != UNCOND


class PerturbedAttentionGuidance(_Weakened):
    """PAG (Ahn et al., arXiv 2403.17377): k has the identity for its self-attention maps in chosen blocks.

        g = u + w (c - u) + s (c - k)

    Joint attention over text and picture tokens is replaced as a whole.

    Args:
        guidance_scale: w, or a callable w(sigma); 1 for PAG alone, c + s (c - k).
        perturbed_guidance_scale: s; 3 in the paper.
        perturbed_guidance_start, perturbed_guidance_stop: its window in shares of the steps.
        perturbed_guidance_layers: numbers of the transformer blocks, in the order of the denoiser's
            definition; None for the middle of it.
        enabled: whether it guides at all.

    Raises:
        ValueError: if a number is out of range; at ``attach`` if there is no such block.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale = 7.5,
        perturbed_guidance_scale: float = 2.8,
        perturbed_guidance_start: float = 0.0,
        perturbed_guidance_stop: float = 1.0,
        perturbed_guidance_layers: int | Sequence[int] | None = None,
        enabled: bool = True,
    ):
        window = (perturbed_guidance_start, perturbed_guidance_stop)
        self._init(guidance_scale, perturbed_guidance_scale, window, perturbed_guidance_layers, enabled)

    def perturb(self, block: torch.nn.Module, rows: Any) -> list[Callable[[], None]]:
        return [identity_attention(attention, rows) for attention in attentions(block)]


class SmoothedEnergyGuidance(_Weakened):
    """SEG (Hong, arXiv 2408.00760): k has queries that are blurred over the picture in chosen blocks.

        g = u + w (c - u) + s (c - k)

    Tokens are taken for a square picture.

    Args:
        guidance_scale: w, or a callable w(sigma); 1 for SEG alone.
        seg_guidance_scale: s; 3 in the paper.
        seg_blur_sigma: standard deviation of the blur in tokens; infinity or anything above 9999 gives the mean.
        seg_guidance_start, seg_guidance_stop: its window in shares of the steps.
        seg_guidance_layers: numbers of the transformer blocks; None for the middle.
        enabled: whether it guides at all.

    Raises:
        ValueError: if a number is out of range; at ``attach`` if there is no such block.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale = 7.5,
        seg_guidance_scale: float = 2.8,
        seg_blur_sigma: float = 9999999.0,
        seg_guidance_start: float = 0.0,
        seg_guidance_stop: float = 1.0,
        seg_guidance_layers: int | Sequence[int] | None = None,
        enabled: bool = True,
    ):
        window = (seg_guidance_start, seg_guidance_stop)
        self._init(guidance_scale, seg_guidance_scale, window, seg_guidance_layers, enabled)
        if not seg_blur_sigma > 0:
            raise ValueError(f"`seg_blur_sigma` must be > 0, got {seg_blur_sigma}")
        self.blur_sigma = math.inf if seg_blur_sigma > 9999 else seg_blur_sigma

    def perturb(self, block: torch.nn.Module, rows: Any) -> list[Callable[[], None]]:
        return [smoothed_queries(attention, rows, self.blur_sigma) for attention in attentions(block)]


class SkipLayerGuidance(_Weakened):
    """SLG (Stability AI, with SD 3.5): k skips chosen transformer blocks.

        g = u + w (c - u) + s (c - k)

    Args:
        guidance_scale: w, or a callable w(sigma); 1 for SLG alone.
        skip_layer_guidance_scale: s; 2.8 for SD 3.5 medium.
        skip_layer_guidance_start, skip_layer_guidance_stop: its window in shares of the steps; 1 to 20 % there.
        skip_layer_guidance_layers: numbers of the transformer blocks; 7, 8, 9 there; None for the middle.
        enabled: whether it guides at all.

    Raises:
        ValueError: if a number is out of range; at ``attach`` if there is no such block.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale = 7.5,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_start: float = 0.01,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_layers: int | Sequence[int] | None = None,
        enabled: bool = True,
    ):
        window = (skip_layer_guidance_start, skip_layer_guidance_stop)
        self._init(guidance_scale, skip_layer_guidance_scale, window, skip_layer_guidance_layers, enabled)

    def perturb(self, block: torch.nn.Module, rows: Any) -> list[Callable[[], None]]:
        return [skip_block(block, rows)]


class AutoGuidance(_Weakened):
    """Autoguidance (Karras et al., arXiv 2406.02507): away from a worse model with the same condition.

        g = k + w (c - k)

    k comes from another, less trained or smaller denoiser with the same inputs, or from this one with blocks
    skipped. No unconditional prediction is needed.

    Args:
        guidance_scale: w, >= 0; 1 for none.
        auto_guidance_layers: numbers of the transformer blocks to skip, where there is no ``weak_denoiser``;
            None for the middle.
        weak_denoiser: the other denoiser; it isn't saved.
        start, stop: its window in shares of the steps.
        enabled: whether it guides at all.

    Raises:
        ValueError: if a number is out of range; at ``attach`` if there is no such block.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 2.0,
        auto_guidance_layers: int | Sequence[int] | None = None,
        weak_denoiser: torch.nn.Module | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        check_finite("guidance_scale", guidance_scale, low=0.0)
        self._init(1.0, 1.0, (start, stop), auto_guidance_layers, enabled)
        self.register_to_config(weak_denoiser=None)
        self.weak_denoiser = weak_denoiser
        self.guidance_scale, self.weak_scale = 1.0, guidance_scale - 1

    def install(self, denoiser: torch.nn.Module, rows: Any) -> Callable[[], None]:
        return (lambda: None) if self.weak_denoiser is not None else super().install(denoiser, rows)

    def perturb(self, block: torch.nn.Module, rows: Any) -> list[Callable[[], None]]:
        return [skip_block(block, rows)]
