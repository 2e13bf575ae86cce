"""Attention as a support vector machine: the margin by which queries can select one token before all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import nnls
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_number

from .nuclear_norm import nuclear_norm_program

__all__ = ["AttentionSVM", "MultiTokenSVM", "attention_svm", "attention_svm_multi", "svm_correlation"]

Norm = Literal["fro", "nuc"]
MOST_CONSTRAINTS = 4000
MOST_NUCLEAR = 256


@dataclass(frozen=True)
class AttentionSVM:
    """The weight of smallest norm that separates the selected tokens; float64 on the CPU.

    Attributes:
        weight: (d, d), token^T weight query is a score; None where nothing separates them.
        multipliers: (n, T), of the constraints, 0 but at support tokens; None for the nuclear norm.
        margin: 1 / norm of the weight, in the units of the scores of a weight of norm 1; 0 where infeasible.
        support: (n, T) bool, tokens at the margin.
        rank: of the weight.
        feasible: whether any weight separates them.
        worst: the least score difference, 1 but for rounding.
    """

    weight: Tensor | None
    multipliers: Tensor | None
    margin: float
    support: Tensor
    rank: int
    feasible: bool
    worst: float


@dataclass(frozen=True)
class MultiTokenSVM:
    """Where attention keeps several tokens: weight ~ finite + scale * direction.

    Attributes:
        finite: (d, d), which gives the kept tokens their probabilities' ratios; None where nothing does.
        direction: (d, d), which separates them from the others and is blind among them; None where nothing does.
        scale: of the direction, by least squares on a trained weight; None without one.
        kept: (n, T) bool, the tokens that attention keeps.
    """

    finite: Tensor | None
    direction: Tensor | None
    scale: float | None
    kept: Tensor


def attention_svm(
    tokens: Tensor,
    queries: Tensor,
    selected: Tensor,
    *,
    norm: Norm = "fro",
    mask: Tensor | None = None,
    max_iter: int = 4000,
    strict: bool = False,
) -> AttentionSVM:
    """min ||W|| such that (x_selected - x_t)^T W z >= 1 for every query z and every other token x_t of its input.

    Gradient descent on one attention layer goes to infinity in the direction of the solution: under Frobenius's norm
    for the weight W itself, under the nuclear norm for W = K Q^T. Source: Tarzanagh, Li, Thrampoulidis, Oymak,
    "Transformers as Support Vector Machines" (arXiv 2308.16898), Att-SVM and Att-SVM*. Frobenius's is solved exactly,
    as a least-distance problem by non-negative least squares on the constraints' Gram matrix (Lawson and Hanson);
    the nuclear one by the alternating direction method of multipliers, scaled at the end so that it is feasible.

    Args:
        tokens: (n, T, d) floating, T >= 2. A token that equals the selected one is no constraint.
        queries: (n, d); n are all queries of all inputs.
        selected: (n,) integers in [0, T).
        norm: "fro" or "nuc"; the latter with d <= 256.
        mask: (n, T) bool, True for tokens that count; None is all.
        max_iter: of the nuclear norm's method.
        strict: raise where no weight separates the tokens.

    Raises:
        TypeError: tensors that are not floating, or selections that are no integers.
        ValueError: shapes that do not fit, a selected token that is masked, more than 4,000 constraints, no
            constraint at all, values that are not finite; with ``strict``, an infeasible problem.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> tokens, queries = eye.view(2, 2, 4), torch.stack([2 * eye[0], eye[1]])
        >>> found = attention_svm(tokens, queries, torch.tensor([0, 0]))
        >>> [[round(value, 4) for value in row] for row in found.weight[:, :2].tolist()]
        [[0.25, 0.0], [-0.25, 0.0], [0.0, 0.5], [0.0, -0.5]]
    """
    checked_choice("norm", norm, ("fro", "nuc"))
    x, z, chosen, counts = _checked(tokens, queries, selected, mask)
    if norm == "nuc" and x.shape[2] > MOST_NUCLEAR:
        raise ValueError(f'`tokens` has {x.shape[2]} dimensions; takes {MOST_NUCLEAR} at most with norm="nuc"')
    rows, others = counts.nonzero(as_tuple=True)
    D, Z = x[rows, chosen[rows]] - x[rows, others], z[rows]
    same = D.square().sum(1) <= 1e-24 * x.square().sum(2).max()
    rows, others, D, Z = rows[~same], others[~same], D[~same], Z[~same]
    if not 1 <= len(D) <= MOST_CONSTRAINTS:
        raise ValueError(f"{len(D)} tokens are to be separated from; takes 1 to {MOST_CONSTRAINTS}: take fewer queries")
    multipliers = _least_distance(D, Z)
    support = torch.zeros_like(counts)
    if multipliers is None:
        if strict:
            raise ValueError("`selected` can't be separated from the other tokens by any weight")
        return AttentionSVM(None, None, 0.0, support, 0, False, 0.0)
    weight = (D * multipliers[:, None]).T @ Z
    if norm == "nuc":
        weight = nuclear_norm_program(D, Z, weight, max_iter=checked_count("max_iter", max_iter))
        size = torch.linalg.svdvals(weight).sum()
    else:
        size = weight.norm()
    scores = torch.einsum("cd,de,ce->c", D, weight, Z)
    active = multipliers > 1e-9 * multipliers.max() if norm == "fro" else scores < 1 + 1e-3
    support[rows[active], others[active]] = True
    duals = None
    if norm == "fro":
        duals = torch.zeros(counts.shape, dtype=torch.float64)
        duals[rows, others] = multipliers
    return AttentionSVM(weight, duals, float(1 / size), support, _rank(weight, norm), True, float(scores.min()))


def attention_svm_multi(
    tokens: Tensor,
    queries: Tensor,
    probabilities: Tensor,
    *,
    threshold: float = 1e-3,
    weight: Tensor | None = None,
) -> MultiTokenSVM:
    """The two parts of a weight under a nonlinear head, where attention keeps several tokens (Frobenius's norm).

    With O_i the tokens of query i whose probability s is at least `threshold`, `finite` is the weight of smallest norm
    with (x_t - x_u)^T W z = log(s_t / s_u) in O_i, `direction` the one that is 0 there and >= 1 between O_i and all
    others; a trained weight is about finite + scale * direction: arXiv 2308.16898, section 5.

    Args:
        tokens: (n, T, d).
        queries: (n, d).
        probabilities: (n, T), of attention.
        threshold: in (0, 1).
        weight: (d, d), a trained one, for `scale`.

    Raises:
        TypeError, ValueError: as :func:`attention_svm`; a query that keeps no token.

    Example:
        >>> x = torch.eye(3, dtype=torch.float64)[None]
        >>> found = attention_svm_multi(x, x[:, 0], torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64))
        >>> bool(torch.isclose(found.finite[0, 0] - found.finite[1, 0], torch.tensor(3.0).log().double()))
        True
    """
    checked_number("threshold", threshold, above=0)
    if probabilities.shape != tokens.shape[:2]:
        raise ValueError(f"`probabilities` has shape {tuple(probabilities.shape)}; takes {tuple(tokens.shape[:2])}")
    x, z, chosen, _ = _checked(tokens, queries, probabilities.argmax(1), None)
    p = probabilities.detach().cpu().double()
    kept = p >= threshold
    if not bool(kept.any(1).all()):
        raise ValueError(f"`threshold` is {threshold:g}, above all probabilities of a query; takes less")
    first = x[torch.arange(len(x)), chosen]

    rows, others = (kept & (torch.arange(x.shape[1]) != chosen[:, None])).nonzero(as_tuple=True)
    D, Z = first[rows] - x[rows, others], z[rows]
    ratios = (p[rows, chosen[rows]] / p[rows, others]).log()
    out_rows, outside = (~kept).nonzero(as_tuple=True)
    if not len(out_rows) or len(rows) + len(out_rows) > MOST_CONSTRAINTS:
        raise ValueError(f"`threshold` leaves {len(out_rows)} tokens out; takes 1 to {MOST_CONSTRAINTS} constraints")
    gram = _gram(D, Z, D, Z)
    finite = None
    if len(D):
        duals = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ ratios
        if float((gram @ duals - ratios).abs().max()) < 1e-6 * (1 + float(ratios.abs().max())):
            finite = (D * duals[:, None]).T @ Z
    else:
        finite = torch.zeros(x.shape[2], x.shape[2], dtype=torch.float64)
    # The tokens' differences within O_i are projected out of the constraints, which makes the direction blind to them.
    E, F = first[out_rows] - x[out_rows, outside], z[out_rows]
    cross, own = _gram(D, Z, E, F), _gram(E, F, E, F)
    map_back = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ cross if len(D) else cross
    duals = _least_norm(own - cross.T @ map_back)
    direction = None
    if duals is not None:
        direction = (E * duals[:, None]).T @ F
        if len(D):
            direction = direction - (D * (map_back @ duals)[:, None]).T @ Z
    scale = None
    if weight is not None and direction is not None and finite is not None:
        rest = weight.detach().cpu().double() - finite
        scale = float((rest * direction).sum() / direction.square().sum())
    return MultiTokenSVM(finite, direction, scale, kept)


def svm_correlation(a: Tensor, b: Tensor) -> float:
    """The cosine between two weights (d, d).

    Raises:
        ValueError: other shapes, or a weight of 0.

    Example:
        >>> round(svm_correlation(torch.eye(2), 3 * torch.eye(2)), 6)
        1.0
    """
    if a.shape != b.shape or not bool(a.any()) or not bool(b.any()):
        raise ValueError(f"the weights have shapes {tuple(a.shape)} and {tuple(b.shape)}; takes two alike, not 0")
    x, y = a.detach().cpu().double(), b.detach().cpu().double()
    return float((x * y).sum() / (x.norm() * y.norm()))


def _checked(tokens: Tensor, queries: Tensor, selected: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Tokens, queries, selections, and which tokens a selection is to be separated from; float64 on the CPU."""
    for name, value in (("tokens", tokens), ("queries", queries)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"`{name}` is {getattr(value, 'dtype', type(value).__name__)}; takes a floating tensor")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"`{name}` has values that are not finite; takes finite ones")
    if tokens.ndim != 3 or tokens.shape[1] < 2 or queries.shape != (tokens.shape[0], tokens.shape[2]):
        shapes = f"{tuple(tokens.shape)} and {tuple(queries.shape)}"
        raise ValueError(f"`tokens` and `queries` have shapes {shapes}; takes (n, T, d) and (n, d), T >= 2")
    n, T, _ = tokens.shape
    if selected.is_floating_point() or selected.dtype == torch.bool:
        raise TypeError(f"`selected` is {selected.dtype}; takes integers")
    if selected.shape != (n,) or int(selected.min()) < 0 or int(selected.max()) >= T:
        raise ValueError(f"`selected` has shape {tuple(selected.shape)}; takes ({n},) with values in [0, {T})")
    counts = torch.ones(n, T, dtype=torch.bool) if mask is None else mask.detach().cpu().bool().clone()
    if counts.shape != (n, T):
        raise ValueError(f"`mask` has shape {tuple(counts.shape)}; takes ({n}, {T})")
    chosen = selected.detach().cpu().long()
    if not bool(counts[torch.arange(n), chosen].all()):
        raise ValueError("`selected` has a token that `mask` leaves out")
    counts[torch.arange(n), chosen] = False
    return tokens.detach().cpu().double(), queries.detach().cpu().double(), chosen, counts


def _gram(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """<a b^T, c d^T> of all pairs, never with (d, d) numbers for each."""
    return (A @ C.T) * (B @ D.T)


def _least_distance(D: Tensor, Z: Tensor) -> Tensor | None:
    """Multipliers of min ||W||_F such that D_c^T W Z_c >= 1, or None; of constraints scaled to length 1."""
    lengths = D.norm(dim=1) * Z.norm(dim=1)
    if not bool((lengths > 0).all()):
        return None
    return _least_norm(_gram(D, Z, D, Z))


def _least_norm(gram: Tensor) -> Tensor | None:
    """a >= 0 with G a >= 1 and a (G a - 1) = 0, by non-negative least squares: [L^T; 1^T] u ~ [0; 1], G = L L^T."""
    diagonal = gram.diagonal()
    if float(diagonal.min()) <= 1e-12 * float(diagonal.max()):
        return None
    size = float(diagonal.mean())
    values, vectors = torch.linalg.eigh(gram / size)
    kept = values > 1e-12 * values[-1]
    root = (vectors[:, kept] * values[kept].sqrt()).T
    system = torch.cat([root, torch.ones(1, len(gram), dtype=gram.dtype)])
    goal = torch.zeros(len(system), dtype=gram.dtype)
    goal[-1] = 1
    u, _ = nnls(system.numpy(), goal.numpy(), maxiter=30 * len(gram))
    found = torch.from_numpy(u)
    residual = system @ found - goal
    if float(residual.norm()) < 1e-7:
        return None
    return found / -residual[-1] / size


def _rank(weight: Tensor, norm: str) -> int:
    values = torch.linalg.svdvals(weight)
    return int((values > (1e-8 if norm == "fro" else 1e-3) * values[0]).sum())
