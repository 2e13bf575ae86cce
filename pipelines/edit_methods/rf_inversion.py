"""RF-Inversion: both directions of the flow steered, towards a draw of the noise and towards the source."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .velocity import Velocity

__all__ = ["controlled_invert", "controlled_sample"]

OnStep = Callable[[int, torch.Tensor], None]


def controlled_invert(
    velocity: Velocity,
    sigmas: torch.Tensor,
    y: torch.Tensor,
    noise: torch.Tensor,
    on_step: OnStep | None = None,
    *,
    gamma: float = 0.5,
) -> torch.Tensor:
    """Clean latents to noisy ones by the controlled ODE.

    From Y = y at s = 0 upwards, with the straight way to a fixed draw of the noise, u_c = (noise - Y) / (1 - s):

        Y <- Y + (s_next - s) (u + gamma (u_c - u)),    u = v(Y, s)

    Source: L. Rout et al., "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations"
    (arXiv 2410.10792), Algorithm 1 (Controlled Forward ODE, Eq. 8). The pipeline in Diffusers takes its schedule's
    sigmas for the steps and i / N for the time that the network is told and in u_c; here all are sigmas.

    Args:
        velocity: under the source prompt, or a blank one.
        sigmas: (steps + 1,) decreasing, ending in 0; gone through from its end.
        y: (B, ...) clean latents.
        noise: shaped like `y`, standard normal.
        on_step: is told after each step its number, from 0, and the clean latents that the velocity there points at.
        gamma: in [0, 1]; 0 is Euler's inversion, 1 the straight way to the noise.

    Returns:
        Latents at level sigmas[0], shaped like `y`.

    Raises:
        ValueError: `gamma` is out of its range.
    """
    _check_share("gamma", gamma)
    up = sigmas.flip(0)
    for step, (s, following) in enumerate(zip(up, up[1:], strict=False)):
        u = velocity(y, s)
        if on_step is not None:
            on_step(step, y - s * u)
        y = y + (following - s) * (u + gamma * ((noise - y) / (1 - s) - u))
    return y


def controlled_sample(
    velocity: Velocity,
    sigmas: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None = None,
    on_step: OnStep | None = None,
    *,
    eta: float = 0.9,
    stop: float = 0.25,
    decay: float = 0.0,
) -> torch.Tensor:
    """Noisy latents to clean ones by the controlled ODE.

    From step to step down to s = 0, with the straight way to the source, (X - y) / s:

        X <- X + (s_next - s) (u + eta_i ((X - y) / s - u)),    u = v(X, s)
        eta_i = eta (1 - i / N)^decay in the first share `stop` of the N steps, else 0

    Source: as for `controlled_invert`, Algorithm 2 (Controlled Reverse ODE, Eq. 15); defaults of the authors' example.

    Args:
        velocity: under the target prompt.
        sigmas: (steps + 1,) decreasing, ending in 0.
        x: (B, ...) latents at level sigmas[0].
        y: clean latents of the source, shaped like `x`.
        mask: weights in [0, 1] that broadcast to `y`: 1 where the latents may change, 0 where they go straight from `x`
            to `y`; None is everywhere.
        on_step: is told after each step its number, from 0, and the clean latents where the edit would end if the
            velocity stayed as it is.
        eta: in [0, 1]: how strongly the source pulls; 0 is Euler's sampler.
        stop: in [0, 1]: for which share of the steps it pulls; all of them at eta 1 give `y` back.
        decay: >= 0.

    Returns:
        Clean latents, shaped like `x`.

    Raises:
        ValueError: `eta`, `stop` or `decay` is out of its range.
    """
    _check_share("eta", eta)
    _check_share("stop", stop)
    if not decay >= 0:
        raise ValueError(f"`decay` is {decay}; takes a number >= 0")
    steps = len(sigmas) - 1
    start, s_0 = x, sigmas[0]
    for i, (s, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        u = velocity(x, s)
        pull = eta * (1 - i / steps) ** decay if i < stop * steps else 0.0
        u = u + pull * ((x - y) / s - u)
        if on_step is not None:
            on_step(i, x - s * u)
        x = x + (following - s) * u
        if mask is not None:
            x = torch.lerp(torch.lerp(y, start, following / s_0), x, mask.expand_as(x))
    return x


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` is {value}; takes a number in [0, 1]")
