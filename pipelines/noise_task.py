"""One call of noise optimization, checked and made ready: the prompts' rows, the map, the starting noise."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import check_latents, checked_count, checked_generators
from .families import denoisers_of, family_of
from .generation_map import GenerationMap
from .gradients import blockwise_checkpointed, frozen_with_backward
from .noise_optimizers import NoiseProblem
from .stock_call import stock_arguments

__all__ = ["NoiseTask", "adds_noise", "prepare_noise_task"]

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class NoiseTask:
    """What a call works on.

    Attributes:
        pipe: the pipeline.
        sampler: noise to clean latents.
        problem: what the optimizer starts from.
        prompts: what the reward is told, one for each sample.
        checkpointing: compute activations twice rather than keep them.
    """

    pipe: Any
    sampler: GenerationMap
    problem: NoiseProblem
    prompts: list[str]
    checkpointing: bool

    @contextlib.contextmanager
    def evaluating(self, with_gradient: bool) -> Iterator[None]:
        """No parameter takes part in a gradient, and activations are kept where they are few.

        A denoiser called once and the autoencoder keep each block's input; a denoiser called often keeps each call's
        (`GenerationMap`), as does one whose weights are moved away between its calls.
        """
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        with torch.set_grad_enabled(with_gradient), frozen_with_backward(modules):
            parts = [self.pipe.vae] if with_gradient and self.checkpointing else []
            if parts and not self.sampler.gradient_checkpointing:
                parts += denoisers_of(self.pipe)
            with blockwise_checkpointed(parts):
                yield

    def release(self) -> None:
        """Sends models away that offloading brought to the device."""
        self.pipe.maybe_free_model_hooks()


def prepare_noise_task(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    *,
    reward_prompt: str | Sequence[str] | None,
    num_images_per_prompt: int,
    latents: Tensor | None,
    generator: Generators,
    num_optimization_steps: int,
    gradient_checkpointing: bool,
    **arguments: Any,
) -> NoiseTask:
    """Checks a call's arguments and draws its noise; nothing but text encoders has run afterwards.

    Args:
        pipe: a pipeline of a family in the table.
        prompt: one or several.
        reward_prompt: what rewards are told, if not `prompt`.
        num_images_per_prompt: samples of each prompt.
        latents: the noise to begin with, or None.
        generator: of the noise to begin with, of fresh noise and of noise within the sampler.
        num_optimization_steps: iterations.
        gradient_checkpointing: compute activations twice rather than keep them.
        arguments: of `GenerationMap`.

    Raises:
        ValueError: for a value out of range, a model of videos, or a sampler that adds noise where `generator` is
            None.
        TypeError: for an argument that the stock call hasn't.
    """
    if family_of(pipe).video:
        raise ValueError(f"`pipe` is a {type(pipe).__name__}, which makes videos; takes a model of pictures")
    steps = checked_count("num_optimization_steps", num_optimization_steps)
    count = checked_count("num_images_per_prompt", num_images_per_prompt)
    prompts, rows = _rows(prompt, arguments, count, latents)
    told = _told(reward_prompt, prompts, count, rows)
    _check_noise(pipe, generator, arguments)
    given = checked_generators(generator, rows) if generator is not None else _fresh()

    inference_steps = _inference_steps(pipe, arguments)
    once = inference_steps == 1 and getattr(pipe, "_all_hooks", None) in (None, [])
    sampler = GenerationMap(
        pipe,
        prompts,
        output="latent",
        generator=_for_the_sampler(given),
        gradient_checkpointing=gradient_checkpointing and not once,
        **arguments,
    )
    sampler.offload_after_call = False
    device = pipe._execution_device
    if latents is None:
        start = sampler.sample_latents(rows, given)
    else:
        check_latents(latents, sampler.latent_shape)
        start = latents.detach().to(device, torch.float32)
    problem = NoiseProblem(
        latents=start.to(device),
        num_steps=steps,
        sample=lambda: sampler.sample_latents(rows, given).to(device),
        generators=given,
    )
    return NoiseTask(pipe, sampler, problem, told, gradient_checkpointing)


def adds_noise(scheduler: Any, num_inference_steps: int) -> bool:
    """Whether a scheduler's steps depend on their generator, tried on a copy.

    Args:
        scheduler: any scheduler of Diffusers.
        num_inference_steps: >= 1; the last step of many adds none.

    Returns:
        True if two generators give two results; False also where it can't be told.

    Example:
        >>> from diffusers import DDIMScheduler, DDPMScheduler
        >>> adds_noise(DDIMScheduler(), 4), adds_noise(DDPMScheduler(), 4)
        (False, True)
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return False
    results = []
    for seed in (0, 1):
        probe = copy.deepcopy(scheduler)
        if not _scheduled(probe, num_inference_steps):
            return False
        generator, sample = torch.Generator().manual_seed(seed), torch.ones(1, 4, 2, 2)
        for timestep in probe.timesteps:
            try:
                sample = probe.step(torch.ones_like(sample), timestep, sample, generator=generator, return_dict=False)[
                    0
                ]
            except IndexError:  # one that lists the end of its last step as well
                break
        results.append(sample)
    return not torch.equal(*results)


def _scheduled(scheduler: Any, steps: int) -> bool:
    for extra in ({}, {"mu": 1.0}, {"intermediate_timesteps": None}):
        with contextlib.suppress(TypeError, ValueError):
            scheduler.set_timesteps(steps, **extra)
            return True
    return False


def _inference_steps(pipe: Any, arguments: dict[str, Any]) -> int:
    for name in ("timesteps", "sigmas"):
        if arguments.get(name) is not None:
            return len(arguments[name])
    steps = arguments.get("num_inference_steps")
    return stock_arguments(pipe)["num_inference_steps"].default if steps is None else steps


def _check_noise(pipe: Any, generator: Generators, arguments: dict[str, Any]) -> None:
    if generator is not None:
        return
    scheduler = arguments.get("scheduler") or pipe.scheduler
    steps = checked_count("num_inference_steps", _inference_steps(pipe, arguments))
    if adds_noise(scheduler, steps):
        raise ValueError(
            f"`generator` is None and {type(scheduler).__name__} adds noise at each step, which must be the same at "
            "every iteration; takes a torch.Generator"
        )


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _for_the_sampler(generator: Any) -> Any:
    """Generators of the noise within the sampler, from the same states but with other numbers than the first noise."""
    if not isinstance(generator, torch.Generator):
        return [_for_the_sampler(item) for item in generator]
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (), generator=twin, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)


def _rows(prompt: Any, arguments: dict[str, Any], count: int, latents: Any) -> tuple[list[str] | None, int]:
    """The prompts, one a sample, and how many samples there are."""
    wanted = len(latents) if isinstance(latents, Tensor) and latents.ndim else None
    if prompt is None:
        embeds = arguments.get("prompt_embeds")
        if embeds is None:
            raise ValueError("`prompt` is None; takes a string or a list of strings, or else pass `prompt_embeds`")
        if count != 1:
            raise ValueError("`num_images_per_prompt` goes with `prompt`; of `prompt_embeds` pass as many rows")
        rows = len(embeds)
        if wanted not in (None, rows):
            raise ValueError(f"`latents` has {wanted} rows for {rows} prompts; takes as many")
        return None, rows
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence) and prompt and all(isinstance(text, str) for text in prompt)
    ):
        raise TypeError(f"`prompt` is {prompt!r}; takes a string or a list of strings")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if isinstance(prompt, str) and wanted is not None and count == 1:
        count = wanted  # one prompt for all of the noise
    negative = arguments.get("negative_prompt")
    if isinstance(negative, list) and len(negative) == len(texts):
        arguments["negative_prompt"] = [text for text in negative for _ in range(count)]
    if wanted not in (None, len(texts) * count):
        raise ValueError(f"`latents` has {wanted} rows for {len(texts) * count} samples; takes as many")
    return [text for text in texts for _ in range(count)], len(texts) * count


def _told(reward_prompt: Any, prompts: list[str] | None, count: int, rows: int) -> list[str]:
    if reward_prompt is None:
        if prompts is None:
            raise ValueError("`reward_prompt` is None; with `prompt_embeds` it takes what the pictures should show")
        return prompts
    texts = [reward_prompt] if isinstance(reward_prompt, str) else list(reward_prompt)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`reward_prompt` is {reward_prompt!r}; takes a string or a list of strings")
    if len(texts) == 1:
        return texts * rows
    if len(texts) * count != rows:
        raise ValueError(f"`reward_prompt` has {len(texts)} strings; takes one, or {rows // count}")
    return [text for text in texts for _ in range(count)]
