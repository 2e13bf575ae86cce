"""Gradient descent on one softmax attention layer, whose direction an SVM foretells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

__all__ = ["AttentionDescent", "attention_descent"]

_TINY = 2.2e-16


@dataclass(frozen=True)
class AttentionDescent:
    """A trained layer; float64 on the CPU.

    Attributes:
        weight: (..., d, d), token^T weight query is a score: W, or K Q^T.
        probabilities: (..., n, T), its attention.
        selected: (..., n), the tokens with the largest.
        loss: (...), at the end.
    """

    weight: Tensor
    probabilities: Tensor
    selected: Tensor
    loss: Tensor


def attention_descent(
    tokens: Tensor,
    queries: Tensor,
    labels: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    *,
    parametrization: Literal["W", "KQ"] = "W",
    num_steps: int = 2000,
    lr: float = 0.1,
    width: int | None = None,
    generator: torch.Generator | None = None,
) -> AttentionDescent:
    """Normalized gradient descent on mean log(1 + exp(-y_i h(X_i^T softmax(X_i W z_i)))) with a fixed head h.

    Source: arXiv 2308.16898, the paper's own experiment: W starts at 0; K and Q start as PyTorch's linear layers do,
    each with its gradient normalized, and with 2.2e-16 (||K||^2 + ||Q||^2) added to the loss, which alone turns them
    once the loss's own gradient has underflown. The direction of W tends to that of
    :func:`~trimtab.optim.attention_svm`'s weight for the tokens that it selects, that of K Q^T to the nuclear norm's;
    those tokens need not have the best scores.

    Args:
        tokens: (..., n, T, d); leading axes are independent layers.
        queries: (..., n, d).
        labels: (..., n), 1 or -1.
        head: (..., d), linear; or a function of attention's outputs (..., n, d) that gives (..., n).
        parametrization: "W", or "KQ" for W = K Q^T.
        num_steps: >= 1.
        lr: > 0, the length of each step.
        width: of K and Q, (d, width); None is d.
        generator: of K's and Q's start; None is seed 0.

    Raises:
        ValueError: shapes that do not fit or a value out of range.
    """
    checked_choice("parametrization", parametrization, ("W", "KQ"))
    checked_count("num_steps", num_steps)
    checked_number("lr", lr, above=0)
    if tokens.ndim < 3 or queries.shape != (*tokens.shape[:-2], tokens.shape[-1]) or labels.shape != queries.shape[:-1]:
        shapes = f"{tuple(tokens.shape)}, {tuple(queries.shape)} and {tuple(labels.shape)}"
        raise ValueError(
            f"`tokens`, `queries`, `labels` have shapes {shapes}; takes (..., n, T, d), (..., n, d), (..., n)"
        )
    x, z, y = (value.detach().cpu().double() for value in (tokens, queries, labels))
    fixed = head if callable(head) and not isinstance(head, Tensor) else _linear(head.detach().cpu().double())
    lead, d = x.shape[:-3], x.shape[-1]
    if parametrization == "W":
        factors = [torch.zeros(*lead, d, d, dtype=torch.float64)]
    else:
        m, random = checked_count("width", d if width is None else width), checked_generator(generator)
        limit = d**-0.5  # nn.Linear's
        draws = [torch.rand(*lead, d, m, generator=random, dtype=torch.float64, device=random.device) for _ in "KQ"]
        factors = [(draw.cpu() * 2 - 1) * limit for draw in draws]

    def attend(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        projected = z @ parts[0].mT if len(parts) == 1 else (z @ parts[1]) @ parts[0].mT
        p = (x @ projected[..., None])[..., 0].softmax(-1)
        return p, softplus(-y * fixed((p[..., None] * x).sum(-2))).mean(-1)

    for _ in range(num_steps):
        leaves = [nn.Parameter(part) for part in factors]
        gradients = torch.autograd.grad(attend(leaves)[1].sum(), leaves)
        if len(factors) == 2:
            gradients = [g + 2 * _TINY * part for g, part in zip(gradients, factors, strict=True)]
        # The tiny term keeps a gradient that underflows from becoming a direction of rounding noise.
        steps = [g / (torch.linalg.matrix_norm(g)[..., None, None] + _TINY) for g in gradients]
        factors = [part - lr * step for part, step in zip(factors, steps, strict=True)]
    p, loss = attend(factors)
    weight = factors[0] if len(factors) == 1 else factors[0] @ factors[1].mT
    return AttentionDescent(weight, p, p.argmax(-1), loss)


def _linear(v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda outputs: (outputs * v[..., None, :]).sum(-1)
