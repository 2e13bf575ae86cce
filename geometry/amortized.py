"""Amortized distributional sliced Wasserstein: slices around a predicted direction, as a training loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .clouds import CloudPair, check_number, check_pair
from .directions import sample_directions
from .one_dimensional import check_order
from .optimized_slices import slices_around
from .sliced_wasserstein import paired_cost
from .slicers import AmortizedSlicer

__all__ = ["AmortizedSlicedWasserstein"]


class AmortizedSlicedWasserstein(nn.Module):
    r"""The amortized v-DSW between clouds and their reconstructions (arXiv 2301.04791, section 3).

    :math:`\min_\phi \max_\psi \mathbb{E}_X \, \mathbb{E}_{\theta \sim \mathrm{vMF}(a_\psi(X, \hat X), \kappa)}
    W_p^p(\theta^\top X, \theta^\top \hat X)`. A training step ascends in psi on :meth:`adversary_loss`, then
    descends in phi on :meth:`loss`; gradients of the latter reach the clouds only through the projected points. Or both
    players move at once by :meth:`joint_loss`, which costs little more than one of the two. With
    ``kappa=math.inf`` it is the amortized Max-SW, which may collapse in training; with a finite kappa every
    direction keeps a positive density, so that a bad prediction does no harm.

    Args:
        slicer: predicts the centres.
        kappa: concentration, > 0; infinite slices along the centre alone.
        num_projections: draws L.
        p: order, >= 1.

    Raises:
        TypeError, ValueError: a number out of range.

    Example:
        >>> distance = AmortizedSlicedWasserstein(AmortizedSlicer(), kappa=1.0)
        >>> ascent = torch.optim.Adam(distance.slicer.parameters(), lr=1e-3, betas=(0.0, 0.9))
        >>> x, y = torch.randn(4, 64, 3), torch.randn(4, 64, 3, requires_grad=True)
        >>> distance.adversary_loss(x, y).backward()
        >>> ascent.step(), ascent.zero_grad()
        (None, None)
        >>> distance.loss(x, y).backward()
        >>> y.grad is not None, all(p.grad is None for p in distance.parameters())
        (True, True)
    """

    def __init__(
        self, slicer: AmortizedSlicer, *, kappa: float = 1.0, num_projections: int = 100, p: float = 2.0
    ) -> None:
        super().__init__()
        check_number(kappa, "kappa", lambda value: value > 0, "a number > 0")
        check_order(p)
        sample_directions(num_projections, 1)  # checks the number
        self.slicer = slicer
        self.kappa, self.num_projections, self.p = kappa, num_projections, p

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"kappa={self.kappa}, num_projections={self.num_projections}, p={self.p}"

    def loss(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean cost of a batch, for the model: the slicer is not trained by it.

        Args:
            x: (B, N, d) or (N, d) floating point.
            y: (B, M, d) or (M, d).
            generator: of the draws.

        Returns:
            A scalar, differentiable in ``x`` and ``y``.

        Raises:
            TypeError, ValueError: as :func:`~trimtab.geometry.sliced_wasserstein`.
        """
        with torch.no_grad():
            centre = self.slicer(x.detach(), y.detach())
        pair = check_pair(x, y)
        return self._cost(pair, centre, generator).mean().to(pair.dtype)

    def adversary_loss(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Minus the mean cost, for the slicer: the clouds are detached.

        Args:
            x: (B, N, d) or (N, d) floating point.
            y: (B, M, d) or (M, d).
            generator: of the draws.

        Returns:
            A scalar, differentiable in the slicer's weights.
        """
        x, y = x.detach(), y.detach()
        pair = check_pair(x, y)
        return -self._cost(pair, self.slicer(x, y), generator).mean().to(pair.dtype)

    def joint_loss(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The mean cost, for both players in one backward pass on the same draws.

        Its gradient in the clouds is that of :meth:`loss`, its gradient in the slicer's weights that of
        :meth:`adversary_loss`: the sign turns between them (gradient reversal; Ganin and Lempitsky 2015, arXiv
        1409.7495). The paper's step differs in that the slicer moves first and directions are then drawn anew.

        Args:
            x: (B, N, d) or (N, d) floating point.
            y: (B, M, d) or (M, d).
            generator: of the draws.

        Returns:
            A scalar, differentiable in ``x``, ``y`` and the slicer's weights.
        """
        centre = _Reversed.apply(self.slicer(x.detach(), y.detach()))
        pair = check_pair(x, y)
        return self._cost(pair, centre, generator).mean().to(pair.dtype)

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """:meth:`loss`."""
        return self.loss(x, y, generator)

    def _cost(self, pair: CloudPair, centre: Tensor, generator: torch.Generator | None) -> Tensor:
        centre = centre.reshape(len(pair.x), -1).to(pair.x.dtype)
        if math.isinf(self.kappa):
            theta = centre[:, None]
        else:
            theta = slices_around(centre, self.kappa, self.num_projections, generator)
        return paired_cost(pair, theta, self.p)


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return -upstream
