"""Codes of a frozen autoencoder moved until their clouds are nearer to given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chamfer import chamfer_distance
from .clouds import check_cloud
from .optimal_transport import earth_movers_distance
from .optimized_slices import distributional_sliced_wasserstein, max_sliced_wasserstein
from .sliced_wasserstein import sliced_wasserstein

__all__ = ["REFINEMENT_LOSSES", "RefinementState", "refine_latents"]

Loss = Callable[[Tensor, Tensor], Tensor]


def _sliced(x: Tensor, y: Tensor) -> Tensor:
    fixed = torch.Generator(x.device).manual_seed(0)
    return sliced_wasserstein(x, y, num_projections=128, directions="quasi", generator=fixed)


def _max_sliced(x: Tensor, y: Tensor) -> Tensor:
    fixed = torch.Generator(x.device).manual_seed(0)
    return max_sliced_wasserstein(x, y, steps=10, generator=fixed)


def _distributional(x: Tensor, y: Tensor) -> Tensor:
    fixed = torch.Generator(x.device).manual_seed(0)
    return distributional_sliced_wasserstein(x, y, num_projections=64, steps=10, generator=fixed)


REFINEMENT_LOSSES: dict[str, Loss] = {
    "sliced_wasserstein": _sliced,
    "distributional_sliced_wasserstein": _distributional,
    "max_sliced_wasserstein": _max_sliced,
    "chamfer": chamfer_distance,
    "earth_movers": lambda x, y: earth_movers_distance(x, y, p=2.0),
}
"""Losses by name; each takes clouds (B, N, d) and (B, M, d) and gives (B,). The earth mover's is of squared lengths."""


@dataclass(frozen=True)
class RefinementState:
    """Where a refinement is.

    Attributes:
        step: k; 0 is the codes as they were given.
        losses: (B,) of this step's codes.
        best_losses: (B,).
        best_latents: (B, latent_dim), each cloud's best codes so far.
        best_clouds: (B, num_points, d), their clouds.
    """

    step: int
    losses: Tensor
    best_losses: Tensor
    best_latents: Tensor
    best_clouds: Tensor


def refine_latents(
    autoencoder: Any,
    latents: Tensor,
    clouds: Tensor,
    *,
    loss: str | Loss = "sliced_wasserstein",
    num_steps: int = 50,
    learning_rate: float = 0.02,
) -> Iterator[RefinementState]:
    r"""Descends :math:`D(\mathrm{decode}(z), X)` in the codes z of each cloud X, with the decoder as it is.

    The encoder gives a good code at once; this gives each cloud's own under a distance of one's choice. By Adam
    (Kingma and Ba 2015, arXiv 1412.6980); codes of unit length are put back to it after each step. Clouds don't
    influence one another.

    Args:
        autoencoder: with ``decode`` and a config, such as :class:`~trimtab.geometry.PointCloudAutoencoder`, in
            evaluation mode.
        latents: (B, latent_dim) to begin with.
        clouds: (B, M, d) of unit radius, as the autoencoder is told them.
        loss: a name in :data:`REFINEMENT_LOSSES` or a function of the decoded clouds and the given ones.
        num_steps: >= 0.
        learning_rate: > 0, of Adam.

    Yields:
        A state for the codes as given, then one a step.

    Raises:
        TypeError, ValueError: arguments that do not fit, before the first state.

    Example:
        >>> from trimtab.geometry import PointCloudAutoencoder
        >>> _ = torch.manual_seed(0)
        >>> model = PointCloudAutoencoder(64, latent_dim=8, encoder_channels=(16,), decoder_channels=(32,)).eval()
        >>> cloud = 0.4 * torch.randn(1, 64, 3)
        >>> first, *_, last = refine_latents(model, model.encode(cloud).latents, cloud, num_steps=20)
        >>> bool(last.best_losses < first.losses)
        True
    """
    distance = REFINEMENT_LOSSES.get(loss) if isinstance(loss, str) else loss
    if distance is None:
        raise ValueError(f"`loss` is {loss!r}; takes one of {', '.join(REFINEMENT_LOSSES)}, or a function")
    check_cloud(clouds, "clouds")
    if clouds.ndim != 3 or latents.ndim != 2 or len(latents) != len(clouds):
        shapes = f"{tuple(latents.shape)} and {tuple(clouds.shape)}"
        raise ValueError(f"`latents` and `clouds` must have shapes (B, latent_dim) and (B, M, d), got {shapes}")
    if not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"`num_steps` must be a whole number >= 0, got {num_steps!r}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` must be a finite number > 0, got {learning_rate!r}")
    return _descent(autoencoder, latents.detach().float(), clouds, distance, num_steps, learning_rate)


def _descent(
    autoencoder: Any, latents: Tensor, clouds: Tensor, distance: Loss, num_steps: int, learning_rate: float
) -> Iterator[RefinementState]:
    codes = latents.clone().requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=learning_rate)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for step in range(num_steps + 1):
        with torch.enable_grad():
            decoded = autoencoder.decode(codes.to(autoencoder.dtype)).sample.float()
            losses = distance(decoded, clouds.to(decoded))
            (codes.grad,) = torch.autograd.grad(losses.sum(), codes)
        now = (losses.detach(), codes.detach().clone(), decoded.detach())
        if best is None:
            best = now
        better = now[0] < best[0]  # False for NaN
        best = tuple(
            torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(now, best, strict=True)
        )
        yield RefinementState(step, now[0], *best)
        if not torch.isfinite(codes.grad).all():
            return
        optimizer.step()
        if autoencoder.config.normalize_latents:
            with torch.no_grad():
                codes /= torch.linalg.vector_norm(codes, dim=1, keepdim=True)
