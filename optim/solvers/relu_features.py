"""The sampled convex program: a lasso on random ReLU features, in place of the program over activation patterns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

from .activation_patterns import with_ones
from .relu_losses import LOSSES
from .relu_program import checked_pairs, checked_targets, network_of_neurons

__all__ = ["SampledReLUResult", "sampled_convex_relu"]


@dataclass(frozen=True)
class SampledReLUResult:
    """A solution of the sampled program.

    Attributes:
        normals: (N, d) float64 of length 1, the neurons' fixed input weights, biases last.
        alpha: (N,), their output weights.
        objective: the program's, which is that of the network with balanced layers.
        lower_bound: the dual's, by a feasible dual point.
        num_iterations: of ADMM.
        converged: both residuals reached the tolerance.
        bias: whether the last column is a bias.
    """

    normals: Tensor = field(repr=False)
    alpha: Tensor = field(repr=False)
    objective: float
    lower_bound: float
    num_iterations: int
    converged: bool
    bias: bool

    @property
    def duality_gap(self) -> float:
        """`objective` - `lower_bound`."""
        return self.objective - self.lower_bound

    def to_module(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """The network of the neurons whose output weight is not 0, with ||u_j|| = |alpha_j| = sqrt of the weight."""
        used = self.alpha != 0
        size = self.alpha[used].abs().sqrt()
        outputs = self.alpha[used].sign() * size
        return network_of_neurons(self.normals[used] * size[:, None], outputs, self.bias, dtype=dtype)


@torch.no_grad()
def sampled_convex_relu(
    X: Tensor,
    y: Tensor | None,
    num_neurons: int,
    *,
    beta: float,
    loss: Literal["squared", "hinge", "logistic"] = "squared",
    pairs: Tensor | None = None,
    bias: bool = True,
    rho: float = 1.0,
    max_iterations: int = 2000,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> SampledReLUResult:
    """min_alpha sum_k loss(sum_i (x_k^T h_i)_+ alpha_i) + beta ||alpha||_1 over N random directions h_i of length 1.

    Source: "Efficient Global Optimization of Two-layer ReLU Networks" (arXiv:2201.01965), SCP. There are no cones and
    no factor grows with N: ADMM's step eliminates all but the outputs. The same guarantee as for sampled patterns
    holds for it, and its optimum is never below that of the networks' own objective, which has beta/2 weight decay.

    Args:
        X: (n, d) floating, the data.
        y: (n,) targets; None with `pairs`.
        num_neurons: N >= 1.
        beta: > 0.
        loss: "squared" (half the square), "hinge" or "logistic"; sums over rows.
        pairs: (m, 2), rows of which the first is preferred.
        bias: neurons have one.
        rho: > 0, ADMM's penalty.
        max_iterations: >= 1.
        tolerance: > 0, of both relative residuals.
        generator: of the directions; None is seed 0.

    Returns:
        The solution; `to_module()` is its network.

    Raises:
        ValueError: data, targets or numbers that do not fit.

    Example:
        >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
        >>> result = sampled_convex_relu(x, x[:, 0].abs(), 200, beta=1e-3)
        >>> bool((result.to_module()(x)[:, 0] - x[:, 0].abs()).abs().max() < 0.05)
        True
    """
    A = with_ones(X, bias)
    kind = LOSSES[checked_choice("loss", loss, tuple(LOSSES))]
    checked_count("num_neurons", num_neurons)
    checked_count("max_iterations", max_iterations)
    beta, rho = checked_number("beta", beta, above=0), checked_number("rho", rho, above=0)
    checked_number("tolerance", tolerance, above=0)
    pairs = checked_pairs(pairs, len(X))
    y = checked_targets(y, pairs, kind, A)
    generator = checked_generator(generator)
    H = torch.randn(num_neurons, A.shape[1], generator=generator, dtype=torch.float64, device=generator.device).to(A)
    H = H / H.norm(dim=1, keepdim=True)
    features = (A @ H.T).clamp_min(0)
    if pairs is not None:
        features = features[pairs[:, 0]] - features[pairs[:, 1]]
    gram = features @ features.T
    factor = torch.linalg.cholesky(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    alpha = lam = A.new_zeros(num_neurons)
    a = mu = A.new_zeros(len(y))
    converged, iteration = False, 0
    while iteration < max_iterations and not converged:  # min l(a) + beta ||alpha||_1, alpha = c, a = features c
        iteration += 1
        r = alpha - lam + features.T @ (a - mu)
        c = r - features.T @ torch.cholesky_solve((features @ r)[:, None], factor)[:, 0]
        old, fitted = torch.cat([alpha, a]), features @ c
        alpha = (c + lam).sign() * ((c + lam).abs() - beta / rho).clamp_min(0)
        a = kind.prox(fitted + mu, y, rho)
        new = torch.cat([alpha, a])
        gap = torch.cat([c, fitted]) - new
        lam, mu = lam + c - alpha, mu + fitted - a
        scale = torch.cat([lam, mu]).norm().clamp_min(1e-12)
        residual = torch.maximum(gap.norm() / new.norm().clamp_min(1e-12), (new - old).norm() / scale)
        converged = float(residual) <= tolerance
    objective = kind.value(kind.margin(features @ alpha, y)).sum() + beta * alpha.abs().sum()
    theta = rho * mu
    theta = theta * (beta / (features.T @ theta).abs().max().clamp_min(1e-300)).clamp_max(1)
    bound = float((-kind.conjugate(theta, y)).sum().nan_to_num(nan=-torch.inf))
    return SampledReLUResult(H, alpha, float(objective), bound, iteration, converged, bias)
