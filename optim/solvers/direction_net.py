"""Search directions from a convolutional network that was trained without labels: the deep half of DCDM."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, relu

from trimtab.optim.checks import checked_count, checked_generator, checked_number

from .grid_poisson import GridPoisson

__all__ = ["DeepDirections", "DirectionNet", "direction_loss", "ritz_pairs", "ritz_right_hand_sides"]

ASSET = "conjugate-directions"
"""Folder, in trimtab.assets, of the trained network."""


class DirectionNet(nn.Module):
    """r to about A^{-1} r up to a factor, on grids of any size.

    The network of "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems" (arXiv:2205.10763) in two
    dimensions: one linear convolution, residual pairs of 3 x 3 convolutions with ReLU, average pooling, more pairs on
    the coarse grid, nearest upsampling with a skip from the fine one, pairs again, and a pointwise linear layer. Three
    departures make it serve grids far larger than it was trained on and masks that it has not seen: the coarse grid
    goes through the same pairs as the fine one and has a coarser grid of its own, down to 4 pixels a side; there are
    no biases, so a factor of r is a factor of the result; and features outside the mask are 0, as the authors'
    padding makes them beyond the grid's edges.

    Args:
        width: channels.
        pairs: residual pairs before the coarse grid, and after it.
        gain: of what comes from a coarse grid before training; A's inverse is four times as large there.

    Raises:
        ValueError: numbers below 1, or `gain` not positive.
    """

    def __init__(self, width: int = 16, pairs: int = 2, gain: float = 2.0) -> None:
        super().__init__()
        self.config = {"width": checked_count("width", width), "pairs": checked_count("pairs", pairs)}
        self.gain = checked_number("gain", gain, above=0)
        self.first = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.before = nn.ModuleList(_Pair(width) for _ in range(pairs))
        self.after = nn.ModuleList(_Pair(width) for _ in range(pairs))
        self.coarse = nn.Conv2d(width, width, 1, bias=False)
        self.last = nn.Conv2d(width, 1, 1, bias=False)
        nn.init.dirac_(self.coarse.weight)
        self.coarse.weight.data.mul_(self.gain)

    def forward(self, r: Tensor, mask: Tensor) -> Tensor:
        """Takes residuals (B, 1, H, W) and masks (B or 1, 1, H, W), 1 at unknown pixels; gives (B, 1, H, W)."""
        return self.last(self._level(self.first(r * mask) * mask, mask)) * mask

    def _level(self, x: Tensor, mask: Tensor) -> Tensor:
        for pair in self.before:
            x = pair(x, mask)
        height, width = x.shape[-2:]
        if max(height, width) > 4:
            odd = (0, width % 2, 0, height % 2)
            y = self._level(avg_pool2d(pad(x, odd), 2), avg_pool2d(pad(mask, odd), 2))
            y = self.coarse(y).repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = x + y[..., :height, :width] * mask
        for pair in self.after:
            x = pair(x, mask)
        return x


class _Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        nn.init.normal_(self.b.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + relu(self.b(relu(self.a(x)) * mask)) * mask


class DeepDirections:
    """What a trained `DirectionNet` proposes for a `GridPoisson`: with `conjugate_directions` it is the paper's DCDM.

    A is scaled to D^{-1/2} A D^{-1/2} with its diagonal D around the network, so that a coefficient that varies
    smoothly looks nearly like none (the scaled operator's leading part is the plain Laplacian).

    A step costs as much as dozens of plain ones, so on a CPU `Multigrid`, which needs about as few, is the fast choice.
    The bundled network serves up to 512 pixels a side; at 1,024 it does not reach 1e-4 in 100 steps.

    Args:
        operator: A. The network was trained with x = 0 beyond the edges; "free" ones cost iterations.
        net: the network; None is the bundled one, trained at 32 and 64 pixels a side.

    Example:
        >>> from trimtab.optim.solvers import conjugate_directions
        >>> A = GridPoisson(torch.ones(64, 64, dtype=torch.bool))
        >>> b = torch.ones(64, 64)
        >>> plain, deep = (conjugate_directions(A, b, propose=m, tolerance=1e-4) for m in (None, DeepDirections(A)))
        >>> deep.iterations < plain.iterations / 3
        True
    """

    def __init__(self, operator: GridPoisson, net: DirectionNet | None = None) -> None:
        self._net = (_bundled() if net is None else net).to(operator.mask.device)
        dtype = self._net.first.weight.dtype
        self._mask = operator.mask[None, None].to(dtype)
        self._scale = torch.where(operator.diagonal > 0, 2 * operator.diagonal.clamp_min(1e-30).rsqrt(), 0).to(dtype)

    @torch.no_grad()
    def __call__(self, r: Tensor) -> Tensor:
        """About A^{-1} r up to a factor, of (..., H, W)."""
        shown = (r.to(self._scale) * self._scale).reshape(-1, 1, *r.shape[-2:])
        return (self._net(shown, self._mask).reshape(r.shape) * self._scale).to(r.dtype)


def direction_loss(operator: Callable[[Tensor], Tensor], b: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """||b - a A f||^2 / ||b||^2 with the step a = f^T b / f^T A f that the solver would take along f.

    The paper's loss (arXiv:2205.10763), which needs no solution. a is best in the A-norm, not in this one, so it can
    exceed 1.

    Args:
        operator: A on (..., H, W).
        b: (B, H, W), right-hand sides or residuals.
        f: (B, H, W), what the network made of them.

    Returns:
        The losses (B,), and what the step leaves of b, (B, H, W).
    """
    product = operator(f)
    energy = (f * product).flatten(1).sum(1)
    step = (f * b).flatten(1).sum(1) / energy.clamp_min(torch.finfo(b.dtype).tiny)
    left = b - step[:, None, None] * product
    return left.square().flatten(1).sum(1) / b.square().flatten(1).sum(1), left


def ritz_pairs(
    operator: Callable[[Tensor], Tensor], start: Tensor, count: int, *, least: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Ritz values and vectors of A by Lanczos' method with full reorthogonalisation, from A times a start vector.

    Args:
        operator: A on tensors of `start`'s shape, symmetric.
        start: floating, such as normal noise; the arithmetic is float64.
        count: of steps, at most the unknowns; fewer where an invariant subspace is reached.
        least: values below it are left out.

    Returns:
        Values (m,) in rising order and orthonormal vectors (m, *shape), of `start`'s dtype.

    Raises:
        ValueError: `count` below 1, or A times the start is 0.
    """
    checked_count("count", count)
    v = operator(start.double()).flatten()
    if not float(v.norm()) > 0:
        raise ValueError("`start` is mapped to 0 by `operator`; takes another")
    basis = [v / v.norm()]
    diagonal, beside = [], []
    for _ in range(count):
        w = operator(basis[-1].reshape(start.shape)).flatten()
        diagonal.append(float(w @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough
            w = w - known.T @ (known @ w)
        size = float(w.norm())
        if len(basis) == count or size < 1e-10 * abs(diagonal[0]):
            break
        beside.append(size)
        basis.append(w / size)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(torch.tensor(beside), 1).double() + torch.diag(torch.tensor(beside), -1).double()
    values, coefficients = torch.linalg.eigh(matrix)
    kept = values >= least
    vectors = coefficients.T[kept] @ torch.stack(basis)
    return values[kept].to(start.dtype), vectors.reshape(-1, *start.shape).to(start.dtype)


def ritz_right_hand_sides(
    vectors: Tensor,
    count: int,
    *,
    low_weight: float = 9.0,
    extra: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """b = sum_i c_i q_i / ||.|| over Ritz vectors, c_i normal and `low_weight` times as large for the smooth half.

    Without that weight a network is bad at smooth errors; the paper takes 9, and 1/2 + 1/20 of the vectors.

    Args:
        vectors: (m, *shape), orthonormal, by rising value.
        count: of right-hand sides.
        low_weight: > 0.
        extra: the share of the vectors beyond one half that counts as smooth, in [0, 0.5].
        generator: None is seed 0.

    Returns:
        (count, *shape), each of norm 1.

    Raises:
        ValueError: a number out of its range.
    """
    checked_number("low_weight", low_weight, above=0)
    if not 0 <= extra <= 0.5:
        raise ValueError(f"`extra` is {extra}; takes a number in [0, 0.5]")
    m = len(vectors)
    c = torch.randn(checked_count("count", count), m, generator=checked_generator(generator)).to(vectors)
    c[:, : round(m * (0.5 + extra))] *= low_weight
    c = c / c.norm(dim=1, keepdim=True)
    return (c @ vectors.reshape(m, -1)).reshape(count, *vectors.shape[1:])


@cache
def _bundled() -> DirectionNet:
    from safetensors.torch import load_file

    from trimtab.assets import asset_path

    folder = asset_path(ASSET)
    net = DirectionNet(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval().requires_grad_(False)
