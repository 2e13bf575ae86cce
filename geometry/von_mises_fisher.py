"""The von Mises-Fisher distribution on the sphere, with reparameterized samples by a rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy import special
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, constraints
from torch.nn import functional

__all__ = ["VonMisesFisher", "rotate_to", "sample_cosines"]

_CANDIDATES = 8


class _Sphere(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (torch.linalg.vector_norm(value, dim=-1) - 1.0).abs() < 1e-3 if value.dtype.is_floating_point else False


class VonMisesFisher(Distribution):
    r"""Density :math:`C_d(\kappa) \exp(\kappa \mu^\top x)` on the unit sphere of R^d with respect to its area.

    ``rsample`` is differentiable in ``loc`` in every dimension and in ``concentration`` for d = 3. The cosine
    ``w = mu . x`` is drawn in closed form for d = 3 and by rejection otherwise (Ulrich 1984, Wood 1994). The rest of
    the vector is drawn in the plane orthogonal to the detached ``mu`` and turned with it by the smallest rotation:
    nowhere singular, unlike a Householder reflection of the first axis, whose gradient has no bound near it.

    Args:
        loc: mean direction mu, unit vectors (..., d), d >= 2.
        concentration: kappa > 0, a number or a tensor that broadcasts with ``loc.shape[:-1]``.
        validate_args: as in torch.distributions, but on by default.

    Raises:
        ValueError: ``loc`` is not of unit length or has d < 2, or ``concentration`` is not finite and > 0.

    Example:
        >>> mu = torch.tensor([0.0, 0.0, 1.0])
        >>> VonMisesFisher(mu, 10.0).mean  # (coth 10 - 1/10) mu
        tensor([0.0000, 0.0000, 0.9000])
    """

    arg_constraints = {"loc": _Sphere(), "concentration": constraints.positive}
    support = _Sphere()
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = True) -> None:
        if loc.ndim < 1 or loc.shape[-1] < 2:
            raise ValueError(f"`loc` must be unit vectors (..., d) with d >= 2, got shape {tuple(loc.shape)}")
        concentration = torch.as_tensor(concentration, dtype=loc.dtype, device=loc.device)
        if not (torch.isfinite(concentration) & (concentration > 0)).all():
            raise ValueError(f"`concentration` must be finite and > 0, got {concentration}")
        batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc = loc.expand(*batch, -1)
        self.concentration = concentration.expand(batch)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> VonMisesFisher:
        """As in torch.distributions."""
        new = self._get_checked_instance(VonMisesFisher, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, -1)
        new.concentration = self.concentration.expand(batch_shape)
        super(VonMisesFisher, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """``A_d(kappa) mu``; its length is the mean resultant length."""
        return _mean_cosine(self.concentration, self.event_shape[0])[..., None] * self.loc

    @property
    def mode(self) -> Tensor:
        """``mu``."""
        return self.loc

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Differentiable samples (*sample_shape, ..., d).

        Args:
            sample_shape: how many.
            generator: of the random numbers; torch's own where None.

        Raises:
            ValueError: ``concentration`` wants a gradient and d is not 3: rejection gives none.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        dim = shape[-1]
        if self.concentration.requires_grad and dim != 3 and torch.is_grad_enabled():
            raise ValueError(f"`concentration` has a gradient through samples for d = 3 only, got d = {dim}")
        w, versine = sample_cosines(shape[:-1], self.concentration, dim, generator)
        device = generator.device if generator is not None else self.loc.device
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.loc.dtype).to(self.loc.device)
        return rotate_to(self.loc, w, versine, noise)

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the sphere's area, (...); differentiable in all arguments."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_normalizer() + self.concentration * (self.loc * value).sum(-1)

    def entropy(self) -> Tensor:
        """``-log C_d(kappa) - kappa A_d(kappa)``, (...)."""
        return -self._log_normalizer() - self.concentration * _mean_cosine(self.concentration, self.event_shape[0])

    def _log_normalizer(self) -> Tensor:
        """``log C_d(kappa) = (d/2 - 1) log kappa - (d/2) log 2 pi - log I_{d/2-1}(kappa)``."""
        kappa, half = self.concentration, self.event_shape[0] / 2
        return (half - 1.0) * kappa.log() - half * math.log(2.0 * math.pi) - _log_bessel(kappa, half - 1.0)


def sample_cosines(
    shape: torch.Size | tuple[int, ...], concentration: Tensor, dim: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws ``w = mu . x`` and ``1 - w``, the latter without the cancellation near ``w = 1``.

    Args:
        shape: of the result.
        concentration: kappa, broadcasting with ``shape``; differentiable for d = 3.
        dim: d >= 2.
        generator: of the random numbers.

    Returns:
        w in [-1, 1] and 1 - w in [0, 2], of ``shape``, with kappa's dtype and device.
    """
    device = generator.device if generator is not None else concentration.device
    kappa = concentration.double().expand(shape)
    if dim == 3:
        uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(kappa.device)
        versine = (-torch.log1p(uniform * torch.expm1(-2.0 * kappa)) / kappa).clamp(0.0, 2.0)
    else:
        with torch.no_grad():
            versine = _rejection(kappa.to(device), dim, generator).to(kappa.device)
    return (1.0 - versine).to(concentration.dtype), versine.to(concentration.dtype)


def _rejection(kappa: Tensor, dim: int, generator: torch.Generator | None) -> Tensor:
    """``1 - w`` by rejection from a beta envelope (Wood 1994), several candidates at once, the first accepted kept."""
    m = dim - 1.0
    root = (4.0 * kappa.square() + m * m).sqrt()
    b = m / (2.0 * kappa + root)
    a = (m + 2.0 * kappa + root) / 4.0
    d = 4.0 * a * b / (1.0 + b) - m * math.log(m)
    result = torch.full_like(kappa, -1.0)
    while bool((result < 0).any()):
        shape = (_CANDIDATES, *kappa.shape)
        gammas = torch._standard_gamma(kappa.new_full((2, *shape), m / 2.0), generator=generator)
        beta = gammas[0] / gammas.sum(0)
        uniform = torch.rand(shape, generator=generator, device=kappa.device, dtype=kappa.dtype)
        denominator = 1.0 - (1.0 - b) * beta
        t = 2.0 * a * b / denominator
        accepted = m * t.log() - t + d >= uniform.log()
        first = accepted.int().argmax(0, keepdim=True)
        versine = (2.0 * b * beta / denominator).gather(0, first)[0]
        result = torch.where((result < 0) & accepted.any(0), versine, result)
    return result.clamp_(0.0, 2.0)


def rotate_to(loc: Tensor, w: Tensor, versine: Tensor, noise: Tensor) -> Tensor:
    r"""Unit vectors at cosine ``w`` to ``loc``, differentiable in ``loc`` through the smallest rotation.

    With :math:`\mu_0` the detached ``loc`` and v the noise made orthogonal to it, the value is
    :math:`\theta_0 = w \mu_0 + \sqrt{1 - w^2} v`, and the gradient is that of
    :math:`\theta_0 - \frac{s^\top \theta_0}{1 + \mu_0^\top \mu} s + 2 (\mu_0^\top \theta_0) \mu`, with
    :math:`s = \mu_0 + \mu`.

    Args:
        loc: unit vectors (..., d).
        w: cosines (...).
        versine: 1 - w, (...).
        noise: Gaussian (..., d).

    Returns:
        (..., d).
    """
    fixed = loc.detach()
    tangent = functional.normalize(noise - (noise * fixed).sum(-1, keepdim=True) * fixed, dim=-1, eps=1e-30)
    sine = (versine * (2.0 - versine)).clamp_min(0.0)
    sine = torch.where(sine > 0, torch.where(sine > 0, sine, 1.0).sqrt(), 0.0)
    theta = w[..., None] * fixed + sine[..., None] * tangent
    if not loc.requires_grad or not torch.is_grad_enabled():
        return theta
    total = fixed + loc
    along = (total * theta).sum(-1, keepdim=True) / (1.0 + (fixed * loc).sum(-1, keepdim=True))
    return theta - along * total + 2.0 * (fixed * theta).sum(-1, keepdim=True) * loc


def _mean_cosine(kappa: Tensor, dim: int) -> Tensor:
    """``A_d(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa)``."""
    return (_log_bessel(kappa, dim / 2) - _log_bessel(kappa, dim / 2 - 1.0)).exp()


def _log_bessel(kappa: Tensor, order: float) -> Tensor:
    return _LogBessel.apply(kappa, order)


class _LogBessel(torch.autograd.Function):
    """``log I_v(kappa)``; its derivative is ``I_{v+1}(kappa) / I_v(kappa) + v / kappa``."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, order: float) -> Tensor:
        value, above = (_scipy_log_bessel(kappa, v) for v in (order, order + 1.0))
        ctx.save_for_backward((above - value).exp() + order / kappa)
        return value.to(kappa.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.saved_tensors[0].to(upstream.dtype), None


def _scipy_log_bessel(kappa: Tensor, order: float) -> Tensor:
    k = kappa.detach().double()
    scaled = torch.as_tensor(special.ive(order, k.cpu().numpy()), device=k.device)
    # For a high order and a small argument I underflows: the first terms of its power series hold there.
    series = order * (k / 2).log() - math.lgamma(order + 1.0) + torch.log1p(k.square() / (4.0 * (order + 1.0)))
    return torch.where(scaled > 1e-290, scaled.clamp_min(1e-300).log() + k, series)
