"""Weakened copies of a denoiser: layers skipped, attention maps replaced or blurred, for some rows of a batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = [
    "Rows",
    "attentions",
    "blocks_of",
    "chosen",
    "identity_attention",
    "middle_blocks",
    "skip_block",
    "smoothed_queries",
]

Undo = Callable[[], None]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass
class Rows:
    """Which rows of a denoiser's batch are the weakened copy: those from ``start`` on, none if it is None."""

    start: int | None = None
    total: int = 0


def blocks_of(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a denoiser, in the order of its definition.

    Those are the entries of its module lists called ``...blocks`` or ``layers``: the blocks of a transformer, the
    ``transformer_blocks`` inside a UNet's attention layers.
    """
    found: list[torch.nn.Module] = []
    for name, module in denoiser.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.ModuleList) and (
            last in ("blocks", "layers") or last.endswith("transformer_blocks")
        ):
            found += [block for block in module if any(_is_attention(m) for m in block.modules())]
    return found


def _is_attention(module: torch.nn.Module) -> bool:
    return hasattr(module, "to_q") and hasattr(module, "to_v")


def attentions(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The self-attention (or joint attention) modules in a block."""
    return [m for m in block.modules() if _is_attention(m) and not getattr(m, "is_cross_attention", False)]


def _weak_rows(rows: Any, length: int) -> int | None:
    """Where the weakened rows start in a tensor of ``length`` rows; None if there are none."""
    return None if rows.start is None else rows.start * length // rows.total


def skip_block(block: torch.nn.Module, rows: Any) -> Undo:
    """The block returns its input for the weakened rows."""
    code = type(block).forward.__code__
    names = code.co_varnames[1 : code.co_argcount]
    place = _hidden_place(block)

    def after(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given.get("hidden_states", args[0] if args else given.get("x"))
        start = _weak_rows(rows, hidden.shape[0])
        if start is None:
            return output
        if isinstance(output, torch.Tensor):
            return torch.cat([output[:start], hidden[start:]])
        # joint blocks return both streams; the last block of some has no text left to return
        sources = [hidden if i == place else given.get("encoder_hidden_states") for i in range(len(output))]
        return type(output)(
            part if part is None else torch.cat([part[:start], source[start:]])
            for part, source in zip(output, sources, strict=True)
        )

    return block.register_forward_hook(after, with_kwargs=True).remove


def _hidden_place(block: torch.nn.Module) -> int:
    """Where a block that returns two streams has the picture's: Diffusers' own table, else second as in most."""
    try:
        place = TransformerBlockRegistry.get(type(block)).return_hidden_states_index
    except ValueError:
        return 1
    return 1 if place is None else place


class _AttentionMode(TorchFunctionMode):
    """Changes query, key and value of the attention inside, for the weakened rows."""

    def __init__(self, rows: Any, change: Callable[..., torch.Tensor]):
        super().__init__()
        self.rows, self.change = rows, change

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs))[:3]
        start = _weak_rows(self.rows, query.shape[0])
        if start is None or query.shape[-2] != key.shape[-2]:  # other lengths: attention across, not within
            return func(*args, **kwargs)
        return self.change(func, args, kwargs, query, value, start)


def _within(module: torch.nn.Module, rows: Any, change: Callable[..., torch.Tensor]) -> Undo:
    """Runs a module's calls in the mode while there are weakened rows."""
    modes: list[_AttentionMode] = []

    def before(module: torch.nn.Module, args: tuple) -> None:
        if rows.start is not None:
            mode = _AttentionMode(rows, change)
            mode.__enter__()
            modes.append(mode)

    def after(module: torch.nn.Module, args: tuple, output: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)

    handles = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def identity_attention(attention: torch.nn.Module, rows: Any) -> Undo:
    """The attention map of the weakened rows is the identity: each token keeps its own value."""

    def change(func: Any, args: tuple, kwargs: dict, query: Any, value: torch.Tensor, start: int) -> torch.Tensor:
        output = func(*args, **kwargs)
        weak = value[start:]
        if weak.shape[1] != output.shape[1]:  # grouped-query attention
            weak = weak.repeat_interleave(output.shape[1] // weak.shape[1], dim=1)
        return torch.cat([output[:start], weak])

    return _within(attention, rows, change)


def smoothed_queries(attention: torch.nn.Module, rows: Any, blur_sigma: float) -> Undo:
    """The queries of the weakened rows are blurred over the picture; an infinite sigma gives their mean."""

    def change(func: Any, args: tuple, kwargs: dict, query: torch.Tensor, value: Any, start: int) -> torch.Tensor:
        smooth = torch.cat([query[:start], _blur(query[start:], blur_sigma)])
        if args:
            return func(smooth, *args[1:], **kwargs)
        return func(**{**kwargs, "query": smooth})

    return _within(attention, rows, change)


def _blur(query: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (B, heads, tokens, d) over the largest square of tokens that is there.

    Tokens are taken for a square picture, those beyond it (text, the rest of a wide picture) stay as they are.
    """
    batch, heads, tokens, width = query.shape
    side = math.isqrt(tokens)
    picture, rest = query[:, :, : side * side], query[:, :, side * side :]
    if math.isinf(sigma):
        smooth = picture.mean(dim=2, keepdim=True).expand_as(picture)
    else:
        radius = min(max(1, math.ceil(3 * sigma)), side - 1)
        offsets = torch.arange(-radius, radius + 1, device=query.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).to(query.dtype)
        grid = picture.transpose(2, 3).reshape(batch * heads * width, 1, side, side)
        grid = functional.pad(grid, (radius,) * 4, mode="reflect")
        grid = functional.conv2d(functional.conv2d(grid, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
        smooth = grid.reshape(batch, heads, width, side * side).transpose(2, 3)
    return torch.cat([smooth, rest], dim=2)


def middle_blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """Where PAG and SEG work best: a UNet's middle, the block halfway through a transformer."""
    middle = getattr(denoiser, "mid_block", None)
    found = blocks_of(middle) if middle is not None else []
    if found:
        return found
    blocks = blocks_of(denoiser)
    if not blocks:
        raise NotImplementedError(f"no transformer blocks are found in {type(denoiser).__name__}")
    return [blocks[len(blocks) // 2]]


def chosen(blocks: Sequence[torch.nn.Module], indices: Sequence[int]) -> list[torch.nn.Module]:
    """The blocks at these places.

    Raises:
        ValueError: if one of them doesn't exist.
    """
    for index in indices:
        if not -len(blocks) <= index < len(blocks):
            raise ValueError(f"layers have {index}, but this denoiser has {len(blocks)} blocks, from 0")
    return [blocks[index] for index in indices]
