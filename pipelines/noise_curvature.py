"""How sharp an optimum of noise is: the spectrum of the reward's Hessian with respect to the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.analysis import SpectrumResult, hessian_operator, hessian_spectrum

from .noise_optimization import as_reward
from .noise_task import prepare_noise_task

__all__ = ["noise_curvature"]


def noise_curvature(
    pipe: Any,
    prompt: str | Sequence[str],
    latents: Tensor,
    *,
    reward: Any = None,
    reward_prompt: str | Sequence[str] | None = None,
    num_steps: int = 20,
    num_probes: int = 1,
    method: Literal["double_backward", "finite_difference"] = "double_backward",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callable[[int, int], Any] | None = None,
    **pipeline_kwargs: Any,
) -> list[SpectrumResult]:
    """The spectrum of the Hessian of z -> -reward(f(z), prompt) at each noise.

    Large eigenvalues are directions in which a little noise costs much reward; most are near 0, along which the
    picture may change and the reward doesn't. 2 / lambda_max is the step at which plain gradient ascent becomes
    unstable there.

    Args:
        pipe: a pipeline for noise optimization, or of a family in the table.
        prompt: one or several.
        latents: (B, *latent_shape), such as `latents` of the optimized pictures.
        reward: None is the pipeline's own; it needs a gradient.
        reward_prompt: what the reward is told, if not `prompt`.
        num_steps: products with the Hessian, for each probe of each picture; each takes about as long as three
            gradients.
        num_probes: see :func:`~trimtab.optim.hessian_spectrum`.
        method: "finite_difference" needs no second derivatives and half the memory.
        generator: as in the call that found the noise, where the sampler adds noise.
        callback: called as (products, products in all) of each picture; True ends that picture's there.
        pipeline_kwargs: arguments of the stock call, as in that call.

    Returns:
        One spectrum a picture.

    Raises:
        ValueError: a reward without a gradient, noise of another shape, or arguments out of range.
        RuntimeError: a model or reward without a second derivative in torch.
    """
    model = getattr(pipe, "reward", None) if reward is None else as_reward(reward)
    if model is None or not model.differentiable:
        raise ValueError(f"`reward` is {getattr(model, 'name', None)!r}; takes one that has a gradient")
    options = {"num_images_per_prompt": 1, "num_optimization_steps": 1, "gradient_checkpointing": False}
    task = prepare_noise_task(
        pipe, prompt, reward_prompt=reward_prompt, latents=latents, generator=generator, **options, **pipeline_kwargs
    )
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    found = []
    try:
        for row in range(len(latents)):
            z = task.problem.latents[row : row + 1].detach().clone().requires_grad_()

            def loss(z: Tensor = z, row: int = row) -> Tensor:
                with task.evaluating(torch.is_grad_enabled()):
                    images = task.sampler.decode(task.sampler(z, prompt_index=[row]))
                    return -model(images if device is None else images.to(device), [task.prompts[row]]).sum()

            operator = hessian_operator(loss, z, method=method)
            found.append(hessian_spectrum(operator, num_steps=num_steps, num_probes=num_probes, callback=callback))
    finally:
        task.release()
    return found
