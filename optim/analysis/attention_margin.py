"""Which tokens the heads of a transformer select, and by what margin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from trimtab.optim.checks import checked_count

from .attention_svm import attention_svm

__all__ = ["HeadMargin", "SelectionReport", "attention_margin", "selection_margin"]

DIFFUSE = 1.5
"""Effective tokens beyond which attention is a mixture and not a selection."""


@dataclass(frozen=True)
class SelectionReport:
    """What n queries select of T tokens. Tensors are on the CPU.

    Attributes:
        selected: (n,), each query's token.
        logit_margin: (n,) float64, its score less the next one's, in the units of scores (nats for a head).
        runner_up: (n,), the next one.
        entropy: (n,) float64, of softmax over the tokens, in nats.
        effective_tokens: (n,), exp(entropy): 1 is a selection.
        normalized_margin: the least margin over the weight's Frobenius norm.
        best_margin: the most that any weight reaches for this selection, 1 / ||W_svm||; 0 where none reaches any;
            None where it wasn't asked for.
        efficiency: normalized over best margin, at most 1; None likewise, or where there is no best one.
        support: (n, T) bool, tokens that limit the best margin; None where it wasn't asked for.
        is_selection: whether the median of effective tokens is below 1.5: beyond, margins say little.
    """

    selected: Tensor
    logit_margin: Tensor
    runner_up: Tensor
    entropy: Tensor
    effective_tokens: Tensor
    normalized_margin: float
    best_margin: float | None
    efficiency: float | None
    support: Tensor | None
    is_selection: bool

    def shares(self, num_tokens: int) -> Tensor:
        """(num_tokens,) float64, the part of the queries that selects each token."""
        return torch.bincount(self.selected, minlength=num_tokens).double() / max(1, len(self.selected))


@dataclass(frozen=True)
class HeadMargin:
    """One head of one call of attention.

    Attributes:
        layer: the module's name.
        call: how many calls of that module were before, such as a sampler's steps.
        head: its number.
        row: of the batch.
        tokens: (T,), the columns of the keys that count.
        attention: (T,), the mean probability of each over the queries, among those.
        report: see :class:`SelectionReport`; `selected` are places in `tokens`.
    """

    layer: str
    call: int
    head: int
    row: int
    tokens: Tensor
    attention: Tensor
    report: SelectionReport


def selection_margin(
    tokens: Tensor,
    queries: Tensor,
    weight: Tensor | None = None,
    selected: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    solve: bool = True,
) -> SelectionReport:
    """How far queries' selections are from ties, and from the best that any weight could do (arXiv 2308.16898).

    Args:
        tokens: (n, T, d) or (T, d), floating, T >= 2.
        queries: (n, d).
        weight: (d, d), token^T weight query is a score; None is the identity over sqrt(d), a head's own scale.
        selected: (n,); None is the token with the largest score.
        mask: (n, T) bool, True for tokens that count, two at least for each query.
        solve: find the best margin, by :func:`~trimtab.optim.attention_svm`.

    Raises:
        TypeError, ValueError: as :func:`~trimtab.optim.attention_svm`.

    Example:
        >>> report = selection_margin(torch.eye(2), torch.tensor([[3.0, 0.0]]), weight=torch.eye(2))
        >>> report.selected.tolist(), report.logit_margin.tolist(), round(report.efficiency, 4)
        ([0], [3.0], 0.5)
    """
    x = (tokens if tokens.ndim == 3 else tokens.expand(len(queries), *tokens.shape)).detach().cpu().double()
    z, d = queries.detach().cpu().double(), queries.shape[-1]
    W = torch.eye(d, dtype=torch.float64) / d**0.5 if weight is None else weight.detach().cpu().double()
    counts = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.cpu().bool()
    if x.shape[1] < 2 or counts.shape != x.shape[:2] or bool((counts.sum(1) < 2).any()):
        raise ValueError(
            f"`mask` or `tokens` of shape {tuple(x.shape)} leaves a query fewer than two tokens; takes two"
        )
    scores = torch.einsum("ntd,de,ne->nt", x, W, z).masked_fill(~counts, -torch.inf)
    chosen = scores.argmax(1) if selected is None else selected.cpu().long()
    own = scores.gather(1, chosen[:, None])[:, 0]
    rest = scores.scatter(1, chosen[:, None], -torch.inf)
    margin, p = own - rest.max(1).values, scores.softmax(1)
    entropy = torch.special.entr(p).sum(1)
    normalized = float(margin.min() / W.norm())
    best, efficiency, support = None, None, None
    if solve:
        found = attention_svm(x, z, chosen, mask=mask)
        best, support = found.margin, found.support
        efficiency = normalized / best if found.feasible else None
    effective = entropy.exp()
    diffuse = float(effective.median()) >= DIFFUSE
    return SelectionReport(
        chosen, margin, rest.argmax(1), entropy, effective, normalized, best, efficiency, support, not diffuse
    )


@torch.no_grad()
def attention_margin(
    model: nn.Module | Callable[..., Any],
    inputs: Any,
    *,
    modules: nn.Module | None = None,
    layers: Sequence[str] | None = None,
    queries: slice | Sequence[int] | None = None,
    tokens: slice | Sequence[int] | None = None,
    ignore_tokens: Sequence[int] = (),
    max_queries: int = 16,
    solve: bool = True,
) -> list[HeadMargin]:
    """What every attention head selects while a model runs, and by what margin.

    Queries and keys are taken where they enter ``scaled_dot_product_attention``, after projections, norms and rotary
    embeddings, so that any transformer of transformers or Diffusers will do that uses it (their default); a head's
    weight is then the identity over sqrt(d).

    Args:
        model: called with the inputs; a module, or a function that runs one, such as a pipeline's sampler.
        inputs: a tuple, a mapping of keyword arguments, or one argument.
        modules: whose attention layers are looked at alone, such as a pipeline's transformer; None is all that runs,
            named if the model is a module.
        layers: parts of layers' names, of which one must occur; None is all.
        queries: which rows of attention are looked at; a DiT with joint attention has its image tokens first.
        tokens: which columns compete; of a DiT the text's, say.
        ignore_tokens: columns that don't, such as CLIP's start token, which takes most of the mass.
        max_queries: of those evenly spaced ones.
        solve: find the best margins, which takes milliseconds to a second a head.

    Returns:
        Heads in the order of the calls; a head whose queries see fewer than two tokens is left out.

    Raises:
        ValueError: no attention was found, or a value out of range.

    Example:
        >>> x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> found = attention_margin(lambda x: scaled_dot_product_attention(x, x, x), x)
        >>> [head.head for head in found], len(found[0].attention)
        ([0, 1], 5)
    """
    checked_count("max_queries", max_queries)
    named = modules if modules is not None else model if isinstance(model, nn.Module) else None
    found: list[HeadMargin] = []
    calls: dict[str, int] = {}
    seen = 0

    def take(layer: str, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        nonlocal seen
        seen += 1
        if (modules is not None and not layer) or (layers is not None and not any(part in layer for part in layers)):
            return
        call = calls[layer] = calls.get(layer, -1) + 1
        rows, columns = _places(queries, q.shape[-2]), _places(tokens, k.shape[-2])
        columns = columns[[int(column) not in set(ignore_tokens) for column in columns]]
        visible = _visible(q, k, mask, causal)[:, :, rows][..., columns]
        factor = q.shape[-1] ** 0.5 * (q.shape[-1] ** -0.5 if scale is None else scale)
        groups = q.shape[1] // k.shape[1]
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                allowed = visible[row % len(visible), head % visible.shape[1]]
                some = allowed.sum(1).ge(2).nonzero()[:, 0]
                if not len(some):
                    continue
                some = some[torch.linspace(0, len(some) - 1, min(max_queries, len(some))).round().long()]
                z = q[row, head, rows[some]].double().cpu() * factor
                x = k[row, head // groups, columns].double().cpu()
                report = selection_margin(x, z, mask=allowed[some], solve=solve)
                scores = (z @ x.T / z.shape[1] ** 0.5).masked_fill(~allowed[some], -torch.inf)
                found.append(HeadMargin(layer, call, head, row, columns, scores.softmax(1).mean(0), report))

    with _named(named) as stack, _Listening(lambda *args: take(stack[-1] if stack else "", *args)):
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    if not seen:
        raise ValueError(
            '`model` never called scaled_dot_product_attention; takes one that does: attn_implementation="sdpa" in '
            "transformers, the default processors in Diffusers"
        )
    return found


class _Listening(TorchFunctionMode):
    def __init__(self, take: Callable[..., None]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            options = given.get("attn_mask"), bool(given.get("is_causal")), given.get("scale")
            with torch._C.DisableTorchFunction():
                self.take(given["query"].detach(), given["key"].detach(), *options)
        return function(*args, **kwargs)


@contextlib.contextmanager
def _named(model: nn.Module | None) -> Iterator[list[str]]:
    """The names of the attention modules that are running, the innermost last."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules() if model is not None else ():
        if "attention" in type(module).__name__.lower():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _places(chosen: slice | Sequence[int] | None, size: int) -> Tensor:
    places = torch.arange(size)
    if chosen is None:
        return places
    found = places[chosen] if isinstance(chosen, slice) else places[torch.as_tensor(list(chosen))]
    if not len(found):
        raise ValueError(f"`queries` or `tokens` is {chosen}, which is none of {size}; takes some")
    return found


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """(rows or 1, heads or 1, queries, keys) bool on the CPU."""
    S, T = q.shape[-2], k.shape[-2]
    if mask is None:
        seen = torch.ones(1, 1, S, T, dtype=torch.bool)
    else:
        seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).cpu()
        seen = seen.expand(*seen.shape[:-2], S, T)
        seen = seen.reshape((1,) * (4 - seen.ndim) + tuple(seen.shape))
    return seen & torch.ones(S, T, dtype=torch.bool).tril() if causal else seen
