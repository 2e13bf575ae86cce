"""SDEdit: noise on the picture, and sampling from there."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from trimtab.pipelines.flowopt_task import EditTask

from .velocity import schedule_of

__all__ = ["sdedit"]


def sdedit(task: EditTask, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    """Edits by noising to the level of the start, and sampling under the target prompt.

        x = (1 - s) y + s eps,    eps ~ N(0, I),    s = sigma of the start;    result f(x)

    Of a diffusion model in place of a flow, x is the scheduler's own mixture. The stronger the noise, the more changes,
    asked for or not. Source: C. Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
    Equations" (arXiv 2108.01073), Algorithm 1; an ODE's sampler stands for the SDE's, as in Diffusers'
    image-to-image pipelines.

    Args:
        task: the pictures and the flow.
        generator: of the noise; one, or one for each picture.

    Returns:
        (B, *latent_shape) float32, clean latents.
    """
    y = task.target
    scheduler = schedule_of(task.sample, y, task.start)
    noise = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    if hasattr(scheduler, "add_noise"):
        x = scheduler.add_noise(y, noise, scheduler.timesteps[:1].expand(len(y)))
    else:
        sigma = scheduler.sigmas[0]
        x = (1 - sigma) * y + sigma * noise
    task.keep_outside(x)
    return task.flow(x)
