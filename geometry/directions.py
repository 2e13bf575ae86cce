"""Directions on the sphere to slice along."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DIRECTIONS", "Directions", "sample_directions"]

Directions = Literal["iid", "orthogonal", "quasi"]
DIRECTIONS = ("iid", "orthogonal", "quasi")
_GOLDEN_ANGLE = math.pi * (3.0 - math.sqrt(5.0))
_MAX_SOBOL_DIMENSION = torch.quasirandom.SobolEngine.MAXDIM


def sample_directions(
    num_projections: int,
    dim: int,
    *,
    kind: Directions = "iid",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit vectors, each uniform on the sphere of R^d.

    The average over all of any function of directions is unbiased whatever the kind; the kinds differ in its variance.

    Args:
        num_projections: how many.
        dim: d >= 1.
        kind: ``"iid"`` are independent; ``"orthogonal"`` come in orthonormal blocks of d (QR of Gaussian matrices);
            ``"quasi"`` fill the sphere evenly, up to sign: equal angles for d = 2 and a Fibonacci spiral for d = 3,
            both randomly rotated, and a scrambled Sobol sequence through the Gaussian quantile function otherwise.
        generator: of the random numbers, on any device.
        device: of the result.
        dtype: of the result.

    Returns:
        (num_projections, d).

    Raises:
        ValueError: ``num_projections`` or ``dim`` below 1, or an unknown kind.

    Example:
        >>> theta = sample_directions(3, 3, kind="orthogonal", generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(theta @ theta.T, torch.eye(3), atol=1e-6)
        True
    """
    if isinstance(num_projections, bool) or not isinstance(num_projections, int) or num_projections < 1:
        raise ValueError(f"`num_projections` must be a whole number >= 1, got {num_projections!r}")
    if dim < 1:
        raise ValueError(f"`dim` must be a whole number >= 1, got {dim!r}")
    if kind not in DIRECTIONS:
        raise ValueError(f"`directions` must be one of {', '.join(DIRECTIONS)}, got {kind!r}")
    drawn_on = generator.device if generator is not None else torch.device(device or "cpu")
    if dim == 1:
        result = torch.ones(num_projections, 1, dtype=torch.float64, device=drawn_on)
    elif kind == "iid":
        result = _normal(num_projections, dim, generator, drawn_on)
    elif kind == "orthogonal":
        blocks = _rotations(-(-num_projections // dim), dim, generator, drawn_on)
        result = blocks.reshape(-1, dim)[:num_projections]
    elif dim == 2:
        offset = torch.rand((), generator=generator, device=drawn_on, dtype=torch.float64)
        angles = (torch.arange(num_projections, device=drawn_on) + offset) * (math.pi / num_projections)
        result = torch.stack([angles.cos(), angles.sin()], dim=1)
    elif dim == 3:
        result = _half_spiral(num_projections, drawn_on) @ _rotations(1, 3, generator, drawn_on)[0]
    else:
        result = _sobol_normal(num_projections, dim, generator, drawn_on)
    return functional.normalize(result, dim=1).to(device=device, dtype=dtype)


def _normal(count: int, dim: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randn(count, dim, generator=generator, device=device, dtype=torch.float64)


def _rotations(count: int, dim: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Orthogonal matrices (count, d, d) of the Haar measure: QR with the signs of R's diagonal made positive."""
    q, r = torch.linalg.qr(_normal(count * dim, dim, generator, device).reshape(count, dim, dim))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


def _half_spiral(count: int, device: torch.device) -> Tensor:
    """A Fibonacci spiral over the upper half of the sphere: a direction and its opposite slice alike."""
    index = torch.arange(count, device=device, dtype=torch.float64)
    height = (index + 0.5) / count
    radius = (1.0 - height.square()).sqrt()
    return torch.stack([radius * (index * _GOLDEN_ANGLE).cos(), radius * (index * _GOLDEN_ANGLE).sin(), height], dim=1)


def _sobol_normal(count: int, dim: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    if dim > _MAX_SOBOL_DIMENSION:
        raise ValueError(f"`directions='quasi'` takes d <= {_MAX_SOBOL_DIMENSION}, got {dim}; take 'orthogonal'")
    seed = int(torch.randint(2**31, (), generator=generator, device=device))
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(2.0**-33, 1.0 - 2.0**-33)).to(device)
