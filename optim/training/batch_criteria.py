"""Tests of whether a mini-batch's gradient is accurate enough, and how many samples would make it so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_count, checked_number

__all__ = [
    "BatchTest",
    "augmented_inner_product_test",
    "coordinate_norm_test",
    "inner_product_test",
    "norm_test",
    "norm_test_from_microbatches",
    "norm_test_from_moments",
    "per_sample_grads",
]

Gradients = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class BatchTest:
    """What a test says of one batch.

    Attributes:
        required: samples that the next batch needs, >= 0; infinite where the batch cannot tell signal from noise.
        passed: whether this batch has them.
        variance: what the test takes for the noise: the trace of the samples' covariance for the norm tests, the
            variance along the mean for the inner product, across it for the orthogonality.
        grad_sq_norm: ||mean||^2, without its bias where that was asked for.
        batch_size: samples tested.
        kind: "norm", "inner_product", "augmented" or "coordinate".
    """

    required: float
    passed: bool
    variance: float
    grad_sq_norm: float
    batch_size: int
    kind: str


def norm_test(grads: Gradients, *, eta: float = 0.5, debias: bool = True) -> BatchTest:
    """The norm test: E||g_B - g||^2 <= eta^2 ||g||^2, its two sides estimated from the batch.

        required = sum_j Var_i(g_ij) / (eta^2 ||mean||^2)

    Source: Lau, Liu, Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods" (arXiv 2402.11215),
    after Byrd, Chin, Nocedal, Wu (2012). Their ||mean||^2 overestimates ||g||^2 by sum_j Var / b, so that near a
    stationary point every batch asks for 1 / eta^2 times its size; without this bias (ours) such a batch says that it
    cannot tell.

    Args:
        grads: gradients of single samples, (b, d), or (b, *shape) by parameter name, which count as one vector.
        eta: relative error allowed, > 0.
        debias: subtract sum_j Var / b from ||mean||^2; False is the paper's.

    Raises:
        TypeError: gradients that are no floating tensors.
        ValueError: fewer than 2 samples, parameters of different numbers of samples, ``eta`` out of range.

    Example:
        >>> grads = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [2.0, -1.0]])
        >>> round(norm_test(grads, eta=0.5, debias=False).required, 6)
        1.333333
    """
    parts, size = _parts(grads)
    mean_square = sum(float(part.mean(0).square().sum()) for part in parts)
    trace = sum(float(part.var(0).sum()) for part in parts)
    return _norm(trace, mean_square, size, eta, debias)


def norm_test_from_microbatches(
    means: Gradients, micro_size: int, *, eta: float = 0.5, debias: bool = True
) -> BatchTest:
    """The norm test from the mean gradients of micro-batches, whose variance is 1 / ``micro_size`` of the samples'.

    Args:
        means: of k >= 2 micro-batches, (k, d) or (k, *shape) by name.
        micro_size: samples in each.
        eta, debias: as :func:`norm_test`, which see also for what is raised.
    """
    micro_size = checked_count("micro_size", micro_size)
    parts, count = _parts(means)
    mean_square = sum(float(part.mean(0).square().sum()) for part in parts)
    trace = micro_size * sum(float(part.var(0).sum()) for part in parts)
    return _norm(trace, mean_square, count * micro_size, eta, debias)


def norm_test_from_moments(
    sum_of_squares: float, mean_square: float, count: int, micro_size: int, *, eta: float = 0.5, debias: bool = True
) -> BatchTest:
    """The norm test from two sums that cost no copy of a gradient.

    Args:
        sum_of_squares: sum of ||m_k||^2 over the mean gradients m_k of ``count`` >= 2 micro-batches.
        mean_square: ||mean of all m_k||^2.
        count: how many.
        micro_size: samples in each.
        eta, debias: as :func:`norm_test`.
    """
    count, micro_size = checked_count("count", count, 2), checked_count("micro_size", micro_size)
    spread = max(0.0, sum_of_squares - count * mean_square) / (count - 1)
    return _norm(micro_size * spread, mean_square, count * micro_size, eta, debias)


def inner_product_test(grads: Gradients, *, theta: float = 0.5, debias: bool = True) -> BatchTest:
    """The inner-product test: the batch's gradient is a descent direction in most draws.

        required = Var_i(<g_i, mean>) / (theta^2 ||mean||^4)

    The product is over all parameters at once. Source: as :func:`norm_test`, after Bollapragada, Byrd, Nocedal (2018).

    Args:
        grads, debias: as :func:`norm_test`, which see also for what is raised.
        theta: > 0.
    """
    theta = checked_number("theta", theta, above=0)
    parts, size = _parts(grads)
    along, _, trace, mean_square = _along_and_across(parts)
    signal = _signal(mean_square, trace, size, debias)
    return _test(along, signal, theta, size, "inner_product")


def augmented_inner_product_test(
    grads: Gradients, *, theta: float = 0.5, nu: float = 1.0, debias: bool = True
) -> BatchTest:
    """The inner-product test together with the orthogonality test, which bounds the gradient's part across the mean.

        required = max(Var_i(<g_i, mean>) / (theta^2 ||mean||^4),
                       sum_j Var_i(g_i - <g_i, mean> mean / ||mean||^2)_j / (nu^2 ||mean||^2))

    Source: as :func:`inner_product_test`.

    Args:
        grads, theta, debias: as :func:`inner_product_test`.
        nu: > 0.
    """
    theta, nu = checked_number("theta", theta, above=0), checked_number("nu", nu, above=0)
    parts, size = _parts(grads)
    along, across, trace, mean_square = _along_and_across(parts)
    signal = _signal(mean_square, trace, size, debias)
    tests = _test(along, signal, theta, size, "augmented"), _test(across, signal, nu, size, "augmented")
    return max(tests, key=lambda test: test.required)


def coordinate_norm_test(grads: Gradients, *, eta: float = 0.5, debias: bool = True) -> BatchTest:
    """The coordinate-wise norm test, E(g_B - g)_j^2 <= eta^2 g_j^2 for every j: what AdAdaGrad's theorem asks for.

        required = max_j Var_i(g_ij) / (eta^2 mean_j^2)

    A single coordinate near its optimum asks for any number: with many parameters it soon asks for the whole data set.
    A coordinate that is 0 in every sample is left out. Source: the paper of :func:`norm_test`.

    Args:
        grads, eta, debias: as :func:`norm_test`, which see also for what is raised.
    """
    eta = checked_number("eta", eta, above=0)
    parts, size = _parts(grads)
    worst = BatchTest(0.0, True, 0.0, 0.0, size, "coordinate")
    for part in parts:
        variance, square = part.var(0).flatten(), part.mean(0).square().flatten()
        signal = (square - variance / size).clamp_min(0.0) if debias else square
        ratio = torch.where(variance > 0, variance / signal, 0.0)
        index = int(ratio.argmax()) if ratio.numel() else None
        if index is not None:
            test = _test(float(variance[index]), float(signal[index]), eta, size, "coordinate")
            worst = max(worst, test, key=lambda test: test.required)
    return worst


def per_sample_grads(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Gradients of single samples, by ``torch.func``: as many copies of the gradient as samples, so for small nets.

    Args:
        model: without batch normalisation; dropout draws anew for each sample.
        loss_fn: of one sample's output and target, gives a 0-d tensor.
        batch: inputs (b, ...) and targets (b, ...).

    Returns:
        (b, *shape) for each trained parameter.

    Raises:
        ValueError: the model has batch normalisation, which makes a sample's gradient depend on the others'.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"`model` has batch normalisation ({name}); takes one without, such as GroupNorm, or use the "
                "micro-batches of AdaptiveBatchSize"
            )
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad} | dict(
        model.named_buffers()
    )

    def loss(parameters: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters | rest, (sample[None],))
        return loss_fn(output[0], target)

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")
    return gradients(trained, *batch)


def _parts(grads: Gradients) -> tuple[list[Tensor], int]:
    """Checked float32 (or float64) parts (b, ...), and b."""
    named = grads if isinstance(grads, Mapping) else {"grads": grads}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`grads` has {got} for {name!r}; takes floating tensors")
    sizes = {len(value) if value.ndim else 0 for value in named.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"`grads` has {sorted(sizes)} samples; takes the same number >= 2 for every parameter")
    wide = [value.detach() if value.dtype == torch.float64 else value.detach().float() for value in named.values()]
    return wide, sizes.pop()


def _along_and_across(parts: list[Tensor]) -> tuple[float, float, float, float]:
    """Variance along the mean and across it, their sum, and ||mean||^2."""
    means = [part.mean(0) for part in parts]
    mean_square = sum(float(mean.square().sum()) for mean in means)
    trace = sum(float(part.var(0).sum()) for part in parts)
    if mean_square == 0.0:
        return 0.0, trace, trace, 0.0
    # by the unit vector: ||mean||^4 underflows in float32
    length = math.sqrt(mean_square)
    products = sum(part.flatten(1) @ (mean / length).flatten() for part, mean in zip(parts, means, strict=True))
    along = float(products.var())
    return along, max(0.0, trace - along), trace, mean_square


def _signal(mean_square: float, trace: float, size: int, debias: bool) -> float:
    return max(0.0, mean_square - trace / size) if debias else mean_square


def _norm(trace: float, mean_square: float, size: int, eta: float, debias: bool) -> BatchTest:
    eta = checked_number("eta", eta, above=0)
    return _test(trace, _signal(mean_square, trace, size, debias), eta, size, "norm")


def _test(variance: float, signal: float, tolerance: float, size: int, kind: str) -> BatchTest:
    if variance == 0.0 and signal > 0.0:
        required = 0.0
    else:
        required = variance / (tolerance**2 * signal) if signal > 0.0 else math.inf
    return BatchTest(required, required <= size, variance, signal, size, kind)
