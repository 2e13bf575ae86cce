"""Sliced Wasserstein distances along optimized directions: the single best, and a distribution around it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .clouds import CloudPair, check_number, check_pair, safe_root
from .directions import sample_directions
from .one_dimensional import check_order
from .sliced_wasserstein import Backend, paired_cost
from .von_mises_fisher import rotate_to, sample_cosines

__all__ = ["distributional_sliced_wasserstein", "max_sliced_wasserstein", "slices_around"]


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 50,
    learning_rate: float = 1.0,
    num_projections: int = 100,
    p: float = 2.0,
    direction: Tensor | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    root: bool = False,
    return_direction: bool = False,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``Max-SW_p^p``, the cost along the direction where the clouds differ most.

    Projected ascent :math:`\theta \leftarrow \mathrm{Proj}(\theta + \eta \nabla_\theta W / |\nabla_\theta W|)` with
    the clouds detached (Deshpande et al. 2019; arXiv 2301.04791; the gradient's length is taken out
    so that the rate suits clouds of any size). It starts at the best of ``num_projections`` random directions and
    keeps the best it has met. An ascent that stops short gives a lower bound.

    Args:
        x: (B, N, d) or (N, d), float16 to float64.
        y: (B, M, d) or (M, d).
        steps: of the ascent, >= 0.
        learning_rate: eta > 0; it falls linearly to zero.
        num_projections: random directions to start from.
        p: order, >= 1.
        direction: (B, d) or (d,) to start from instead; normalised here.
        x_weights: (B, N) or (N,), weights or a mask.
        y_weights: likewise for ``y``.
        root: whether to return the distance, the p-th root.
        return_direction: whether to return the directions (B, d) or (d,) too.
        generator: of the random directions.
        backend: of the sort, see :func:`~trimtab.geometry.sliced_wasserstein`.

    Returns:
        (B,) or a scalar, differentiable in ``x`` and ``y``; with ``return_direction`` a pair.

    Raises:
        TypeError, ValueError: as :func:`~trimtab.geometry.sliced_wasserstein`, and for ``steps`` or
            ``learning_rate`` out of range.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> y = x + torch.tensor([0.0, 2.0, 0.0])
        >>> cost, direction = max_sliced_wasserstein(x, y, return_direction=True, generator=torch.Generator())
        >>> cost.round(decimals=2), direction.abs().round(decimals=2)
        (tensor(4.), tensor([0., 1., 0.]))
    """
    pair = check_pair(x, y, x_weights, y_weights)
    _check_ascent(steps, learning_rate, p)

    def cost(candidate: Tensor) -> Tensor:
        return paired_cost(_fixed(pair), candidate[:, None], p, backend)

    theta = _start(pair, direction, num_projections, p, generator, backend)
    theta = _ascend(cost, theta, steps, learning_rate, keep_best=True)
    value = paired_cost(pair, theta[:, None], p, backend)
    return _output(pair, value, theta, p, root, return_direction)


def distributional_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    kappa: float = 1.0,
    num_projections: int = 100,
    steps: int = 50,
    learning_rate: float = 1.0,
    p: float = 2.0,
    direction: Tensor | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    root: bool = False,
    return_direction: bool = False,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``v-DSW_p^p``, the cost along von Mises-Fisher directions around the best centre.

    :math:`\max_\epsilon \mathbb{E}_{\theta \sim \mathrm{vMF}(\epsilon, \kappa)} W_p^p` (arXiv 2301.04791): between the
    sliced distance (kappa to 0) and the max-sliced one (kappa to infinity). The centre is found as in
    :func:`~trimtab.geometry.max_sliced_wasserstein`, through reparameterized draws, fresh ones at every step; the final
    value is of draws that no step has seen. All clouds of a batch share their random numbers.

    Args:
        x: (B, N, d) or (N, d), float16 to float64.
        y: (B, M, d) or (M, d).
        kappa: concentration, > 0.
        num_projections: draws L a step and of the final value.
        steps: of the ascent; 0 evaluates at ``direction``.
        learning_rate: eta > 0; it falls linearly to zero.
        p: order, >= 1.
        direction: (B, d) or (d,), the centre to start from; None is the best of ``num_projections`` random ones.
        x_weights: (B, N) or (N,), weights or a mask.
        y_weights: likewise for ``y``.
        root: whether to return the distance, the p-th root.
        return_direction: whether to return the centres (B, d) or (d,) too.
        generator: of the random numbers.
        backend: of the sort, see :func:`~trimtab.geometry.sliced_wasserstein`.

    Returns:
        (B,) or a scalar, differentiable in ``x`` and ``y``; with ``return_direction`` a pair.

    Raises:
        TypeError, ValueError: as :func:`~trimtab.geometry.max_sliced_wasserstein`, and for ``kappa`` not finite
            and > 0.
    """
    pair = check_pair(x, y, x_weights, y_weights)
    _check_ascent(steps, learning_rate, p)
    check_number(kappa, "kappa", lambda value: 0 < value < math.inf, "a finite number > 0")
    sample_directions(num_projections, 1)  # checks the number

    def cost(centre: Tensor) -> Tensor:
        theta = slices_around(centre, kappa, num_projections, generator)
        return paired_cost(_fixed(pair), theta, p, backend)

    centre = _start(pair, direction, num_projections, p, generator, backend)
    centre = _ascend(cost, centre, steps, learning_rate, keep_best=False)
    theta = slices_around(centre, kappa, num_projections, generator)
    value = paired_cost(pair, theta, p, backend)
    return _output(pair, value, centre, p, root, return_direction)


def slices_around(
    centre: Tensor, kappa: float, num_projections: int, generator: torch.Generator | None = None
) -> Tensor:
    """Directions (B, L, d) from vMF(centre, kappa), differentiable in the centres (B, d).

    All centres share the L cosines and the L Gaussian vectors behind them, so a batch gives what its items give.
    """
    dim = centre.shape[-1]
    if dim == 1:
        return centre[:, None].expand(-1, num_projections, -1)
    concentration = torch.as_tensor(kappa, dtype=centre.dtype, device=centre.device)
    w, versine = sample_cosines((num_projections,), concentration, dim, generator)
    device = generator.device if generator is not None else centre.device
    noise = torch.randn(num_projections, dim, generator=generator, device=device, dtype=centre.dtype)
    return rotate_to(centre[:, None], w, versine, noise.to(centre.device))


def _ascend(
    cost: Callable[[Tensor], Tensor], theta: Tensor, steps: int, learning_rate: float, *, keep_best: bool
) -> Tensor:
    """Projected ascent of a cost (B,) in directions (B, d)."""
    best, best_value = theta, theta.new_full(theta.shape[:1], -math.inf)
    for step in range(steps + keep_best):
        theta = theta.detach().requires_grad_(step < steps)
        with torch.enable_grad():
            value = cost(theta)
        if keep_best:
            better = value.detach() > best_value
            best_value = torch.where(better, value.detach(), best_value)
            best = torch.where(better[:, None], theta.detach(), best)
        if step < steps:
            (gradient,) = torch.autograd.grad(value.sum(), theta)
            rate = learning_rate * (1.0 - step / steps)
            theta = functional.normalize(theta.detach() + rate * functional.normalize(gradient, dim=-1), dim=-1)
    return (best if keep_best else theta).detach()


def _fixed(pair: CloudPair) -> CloudPair:
    return CloudPair(pair.x.detach(), pair.y.detach(), pair.x_weights, pair.y_weights, pair.batched, pair.dtype)


@torch.no_grad()
def _start(
    pair: CloudPair,
    direction: Tensor | None,
    num_projections: int,
    p: float,
    generator: torch.Generator | None,
    backend: Backend,
) -> Tensor:
    """The direction given, or for each pair the best of random ones, (B, d)."""
    batch, dim = len(pair.x), pair.x.shape[-1]
    if direction is not None:
        wanted = (batch, dim) if pair.batched else (dim,)
        if tuple(direction.shape) != wanted or not torch.isfinite(direction).all():
            raise ValueError(f"`direction` must be finite with shape {wanted}, got {tuple(direction.shape)}")
        return functional.normalize(direction.detach().to(pair.x).reshape(batch, dim), dim=-1)
    options = {"generator": generator, "device": pair.x.device, "dtype": pair.x.dtype}
    theta = sample_directions(num_projections, dim, **options)
    value = paired_cost(pair, theta.expand(batch, -1, -1), p, backend, slices=True)
    return theta[value.argmax(1)]


def _check_ascent(steps: int, learning_rate: float, p: float) -> None:
    check_order(p)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"`steps` must be a whole number >= 0, got {steps!r}")
    check_number(learning_rate, "learning_rate", lambda value: 0 < value < math.inf, "a finite number > 0")


def _output(
    pair: CloudPair, value: Tensor, direction: Tensor, p: float, root: bool, return_direction: bool
) -> Tensor | tuple[Tensor, Tensor]:
    value = pair.result(safe_root(value, p) if root else value)
    return (value, pair.result(direction)) if return_direction else value
