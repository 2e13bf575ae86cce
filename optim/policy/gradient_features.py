"""Features that say in which direction a sample would push a policy, from forward passes alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_count

__all__ = ["LastLayerFeature", "last_layer_gradient", "token_sensitivity"]


@torch.no_grad()
def token_sensitivity(
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    chunk: int = 1024,
    top_k: int | None = None,
) -> Tensor:
    """Sequence features of a discrete policy pi = softmax(W h): the mean over tokens of W' (e_y - p).

    That is the gradient by h of the mean log-likelihood, and every gradient below the head is linear in it. With a
    temperature it is so up to the factor 1 / T, which cosines don't see: `logits` are those divided by T.

    Source: arXiv 2512.15687, equations (6) to (8) and (14).

    Args:
        logits: (B, T, V), of the sampling distribution; soft-capped and scaled as the model does it.
        tokens: (B, T), sampled, integers in [0, V).
        weight: (V, D), the head's.
        mask: (B, T), which tokens are the answer's; None is all.
        chunk: tokens at once, which bounds the memory.
        top_k: keeps the k largest probabilities, renormalized.

    Returns:
        (B, D), float32, or float64 for float64 logits. 0 for an answer without tokens.

    Raises:
        ValueError: for shapes that don't fit.
    """
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or weight.ndim != 2 or len(weight) != logits.shape[2]:
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}, `tokens` {tuple(tokens.shape)} and `weight` "
            f"{tuple(weight.shape)}; takes (B, T, V), (B, T) and (V, D)"
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"`mask` has shape {tuple(mask.shape)}; takes {tuple(tokens.shape)}")
    checked_count("chunk", chunk)
    precise = torch.promote_types(logits.dtype, torch.float32)
    kept = torch.ones_like(tokens, dtype=precise) if mask is None else mask.to(precise)
    shares = (kept / kept.sum(1, keepdim=True).clamp(min=1)).flatten()
    weight, flat, chosen = weight.to(precise), logits.flatten(0, 1), tokens.flatten()
    rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
    found = weight.new_zeros(len(tokens), weight.shape[1])
    for part in torch.arange(len(chosen), device=tokens.device).split(chunk):
        p = flat[part].to(precise).softmax(1)
        if top_k is None:
            expected = p @ weight
        else:
            values, places = p.topk(min(checked_count("top_k", top_k), p.shape[1]))
            expected = torch.einsum("nk,nkd->nd", values / values.sum(1, keepdim=True), weight[places])
        found.index_add_(0, rows[part], shares[part, None] * (weight[chosen[part]] - expected))
    return found


@torch.no_grad()
def last_layer_gradient(residual: Tensor, hidden: Tensor, *, projection: Tensor | None = None) -> Tensor:
    """Gradient of half the squared residual, summed over tokens, by the last linear layer's weight.

    Args:
        residual: (B, T, O), output less target.
        hidden: (B, T, D), the layer's input.
        projection: (O D, r), applied to the flattened gradient; None leaves it.

    Returns:
        (B, O D) or (B, r).

    Raises:
        ValueError: for shapes that don't fit.
    """
    if residual.ndim != 3 or hidden.ndim != 3 or residual.shape[:2] != hidden.shape[:2]:
        raise ValueError(
            f"`residual` has shape {tuple(residual.shape)} and `hidden` {tuple(hidden.shape)}; "
            "takes (B, T, O), (B, T, D)"
        )
    precise = torch.promote_types(torch.promote_types(residual.dtype, hidden.dtype), torch.float32)
    gradient = torch.einsum("bto,btd->bod", residual.to(precise), hidden.to(precise)).flatten(1)
    return gradient if projection is None else gradient @ projection.to(gradient)


class LastLayerFeature:
    """Features of finished samples of a denoiser: the last linear layer's gradient of the matching loss.

    Of a Gaussian step the sensitivity of an on-policy sample is the injected noise, whatever the model, so the
    token-level feature says nothing there. In its place: noise the finished samples x0 anew at M levels, with the same
    noise for all of a group, call the denoiser within this context, and hand over the residuals of its outputs, in the
    layer's own token layout. This form is this package's, not the paper's.

    Args:
        module: the denoiser's last `nn.Linear`.

    Raises:
        TypeError: for another module.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with LastLayerFeature(layer) as feature:
        ...     outputs = [layer(torch.ones(4, 5, 3)) for _ in range(2)]
        >>> feature.features([output - 1 for output in outputs]).shape
        torch.Size([4, 6])
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            raise TypeError(f"`module` is a {type(module).__name__}; takes a torch.nn.Linear")
        self.module = module
        self.inputs: list[Tensor] = []
        self._handle: Any = None

    def __enter__(self) -> LastLayerFeature:
        self.inputs = []
        self._handle = self.module.register_forward_hook(lambda _, args, __: self.inputs.append(args[0].detach()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def features(self, residuals: Sequence[Tensor], *, projection: Tensor | None = None) -> Tensor:
        """The mean over the calls of their gradients.

        Args:
            residuals: one (B, T, O) for each call of the layer, in their order.
            projection: as in `last_layer_gradient`.

        Returns:
            (B, O D) or (B, r), float32 at the least.

        Raises:
            ValueError: for another number of residuals than calls, or shapes that don't fit.
        """
        if not self.inputs or len(residuals) != len(self.inputs):
            raise ValueError(f"`residuals` has {len(residuals)} entries; takes {len(self.inputs)}, one for each call")
        found = [
            last_layer_gradient(residual, hidden, projection=projection)
            for residual, hidden in zip(residuals, self.inputs, strict=True)
        ]
        return torch.stack(found).mean(0)
