"""FlowEdit: straight from the source to the target along the difference of two velocities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .velocity import Velocity

__all__ = ["flowedit"]


def flowedit(
    v_source: Velocity,
    v_target: Velocity,
    sigmas: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator | list[torch.Generator],
    on_step: Callable[[int, torch.Tensor], None] | None = None,
    mask: torch.Tensor | None = None,
    *,
    n_avg: int = 1,
    n_min: int = 0,
) -> torch.Tensor:
    """Edits without an inversion.

    From Z = y, at each step from s to s_next, with n_avg draws of eps ~ N(0, I):

        Z_src = (1 - s) y + s eps,    Z_tar = Z + Z_src - y
        Z <- Z + (s_next - s) mean(v_target(Z_tar, s) - v_source(Z_src, s))

    and in the last n_min steps ordinary sampling under the target prompt, from Z_tar. Source: V. Kulikov et al.,
    "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models" (arXiv 2412.08629), Algorithm 1, where
    n_max is the number of steps of `sigmas`. The authors' settings are 50 steps with n_max = 33 and guidance scales
    3.5 and 13.5 for Stable Diffusion 3, 28 with n_max = 24 and 1.5 and 5.5 for FLUX.1-dev.

    Args:
        v_source: velocity under the source prompt.
        v_target: velocity under the target prompt.
        sigmas: (steps + 1,) decreasing, ending in 0.
        y: (B, ...) clean latents of the source.
        generator: of the noise; one, or one for each picture.
        on_step: is told after each step its number, from 0, and the clean latents where the edit would end if the
            velocities stayed as they are: Z - s_next mean(v_target - v_source), in the last n_min steps x - s_next v.
        mask: weights in [0, 1] that broadcast to `y`: 1 where the latents may change, 0 where they stay on the way of
            the source; None is everywhere.
        n_avg: draws that a velocity is averaged over, >= 1.
        n_min: last steps that sample in the ordinary way, from 0 to the number of steps.

    Returns:
        Clean latents, shaped like `y`.

    Raises:
        ValueError: `n_avg` or `n_min` is out of its range.
    """
    steps = len(sigmas) - 1
    if n_avg < 1:
        raise ValueError(f"`n_avg` is {n_avg}; takes an integer >= 1")
    if not 0 <= n_min <= steps:
        raise ValueError(f"`n_min` is {n_min}; takes 0 to {steps}, the steps that are run")

    def noised(sigma: torch.Tensor) -> torch.Tensor:
        return (1 - sigma) * y + sigma * randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)

    def kept(x: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        return x if mask is None else torch.lerp(outside, x, mask.expand_as(x))

    z = y
    for step, (s, following) in enumerate(zip(sigmas[: steps - n_min], sigmas[1:], strict=False)):
        change = torch.zeros_like(y)
        for _ in range(n_avg):
            source = noised(s)
            change += v_target(z + source - y, s) - v_source(source, s)
        z = kept(z + (following - s) * change / n_avg, y)
        if on_step is not None:
            on_step(step, z - following * change / n_avg)
    if n_min:
        s = sigmas[steps - n_min]
        source = noised(s)
        eps = (source - (1 - s) * y) / s
        x = z + source - y
        for step, (s, following) in enumerate(zip(sigmas[steps - n_min :], sigmas[steps - n_min + 1 :], strict=False)):
            velocity = v_target(x, s)
            x = kept(x + (following - s) * velocity, (1 - following) * y + following * eps)
            if on_step is not None:
                on_step(steps - n_min + step, x - following * velocity)
        z = x
    return z
