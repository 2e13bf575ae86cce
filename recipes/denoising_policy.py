"""A pipeline's sampler as a policy: chains of latents, their log-probabilities with a graph, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.optim import LastLayerFeature
from trimtab.pipelines.families import family_of
from trimtab.pipelines.latents import decode_latents
from trimtab.schedulers import FlowMatchStochasticScheduler

from .distil import velocity_of

__all__ = ["Chains", "DenoisingPolicy", "GuidedVelocity", "Texts", "encode_captions"]


@dataclass(frozen=True)
class Texts:
    """Captions and what a pipeline's text encoders make of them.

    Attributes:
        captions: N of them.
        features: (N, L, D) float32.
        pooled: (N, P) float32.
    """

    captions: Sequence[str]
    features: Tensor
    pooled: Tensor

    def rows(self, index: Tensor) -> Texts:
        """Those of the numbers (M,), which may repeat."""
        return Texts([self.captions[i] for i in index.tolist()], self.features[index], self.pooled[index])

    def to(self, device: torch.device) -> Texts:
        """On a device."""
        return Texts(self.captions, self.features.to(device), self.pooled.to(device))


@dataclass(frozen=True)
class Chains:
    """What a policy drew, without history.

    Attributes:
        texts: B rows.
        states: (B, K + 1, ...) float32, the latents before and after each of the K transitions that are learnt.
        latents: (B, ...), finished.
    """

    texts: Texts
    states: Tensor
    latents: Tensor

    def rows(self, index: Tensor) -> Chains:
        """Those of the numbers (M,)."""
        return Chains(self.texts.rows(index), self.states[index], self.latents[index])


@torch.no_grad()
def encode_captions(pipe: StableDiffusion3Pipeline, captions: Sequence[str], *, max_sequence_length: int = 16) -> Texts:
    """Text features on the CPU, as the stock call has them.

    Raises:
        ValueError: no captions.
    """
    if not captions:
        raise ValueError("`captions` is empty; takes at least one")
    features, pooled = [], []
    for start in range(0, len(captions), 32):
        part = list(captions[start : start + 32])
        outputs = pipe.encode_prompt(
            part, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        features.append(outputs[0].float().cpu())
        pooled.append(outputs[2].float().cpu())
    return Texts(list(captions), torch.cat(features), torch.cat(pooled))


class GuidedVelocity(nn.Module):
    """The velocity that a sampler follows: a transformer's own, or under classifier-free guidance u + w (c - u).

    Args:
        transformer: is trained.
        nothing: the empty caption's row; None where there is no guidance.
        guidance_scale: w; 1 calls the transformer once a velocity.
    """

    def __init__(self, transformer: nn.Module, nothing: Texts | None = None, guidance_scale: float = 1.0) -> None:
        super().__init__()
        self.transformer = transformer
        self.guidance_scale = guidance_scale
        self.register_buffer("no_features", None if nothing is None else nothing.features, persistent=False)
        self.register_buffer("no_pooled", None if nothing is None else nothing.pooled, persistent=False)

    def forward(self, latents: Tensor, sigmas: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at latents (B, C, H, W) and noise levels (B,), for texts (B, L, D) and (B, P)."""
        if self.guidance_scale == 1.0:
            return velocity_of(self.transformer, latents, sigmas, features, pooled)
        rows = len(latents)
        features = torch.cat([self.no_features.expand(rows, -1, -1), features])
        pooled = torch.cat([self.no_pooled.expand(rows, -1), pooled])
        both = velocity_of(self.transformer, torch.cat([latents] * 2), torch.cat([sigmas] * 2), features, pooled)
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


class DenoisingPolicy:
    """The sampler of a pipeline with noise in its steps: an action is the next state, its density a Gaussian.

    Args:
        pipe: gives scheduler and autoencoder.
        sigmas: noise levels of the network's evaluations, falling from 1; the last step leads to 0.
        noise_level: of :class:`FlowMatchStochasticScheduler`.
        transition: "ddim", whose last step has no noise, or "sde".
        learnt: of so many first transitions log-densities are asked; None is all that have noise. The later ones
            decide least of a picture, and have the noisiest scores, as their deviation is the smallest.
    """

    def __init__(
        self,
        pipe: StableDiffusion3Pipeline,
        sigmas: Sequence[float],
        *,
        noise_level: float = 0.5,
        transition: str = "ddim",
        learnt: int | None = None,
    ) -> None:
        self.pipe, self.learnt = pipe, learnt
        self.scheduler = FlowMatchStochasticScheduler.from_config(
            pipe.scheduler.config, noise_level=noise_level, transition=transition
        )
        self.sigmas = list(sigmas)
        self.scheduler.set_timesteps(sigmas=self.sigmas)
        config = pipe.transformer.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.scale = self.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def draw(self, module: nn.Module, texts: Texts, noise: Tensor, generator: torch.Generator) -> Chains:
        """Chains of the policy as it is.

        Args:
            module: as :class:`GuidedVelocity`.
            texts: B rows on the module's device.
            noise: (B, C, H, W), what the chains start from, on the CPU or the device.
            generator: of the transitions' noise.
        """
        latents = noise.to(texts.features.device)
        self.scheduler.set_timesteps(sigmas=self.sigmas)  # a new run
        with self.scheduler.recording(generator) as trajectory, _attention(latents.device):
            for timestep in self.scheduler.timesteps:
                sigmas = (timestep / self.scale).to(latents.device).expand(len(latents))
                velocity = module(latents, sigmas, texts.features, texts.pooled).float()
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        kept = trajectory[: self.learnt]
        states = torch.stack([taken.sample for taken in kept] + [kept[-1].prev_sample], 1)
        return Chains(texts, states, latents)

    def log_probs(self, module: nn.Module, chains: Chains, *, reduce: str) -> Tensor:
        """Log-densities (B, K) of the chains' transitions, with a graph, from one call of the module.

        Args:
            module: as :class:`GuidedVelocity`.
            chains: B of them.
            reduce: "sum" over coordinates, or "mean".
        """
        taken = chains.states.shape[1] - 1
        before = chains.states[:, :-1].flatten(0, 1)
        times = self.scheduler.timesteps[:taken].to(before)
        features, pooled = (x.repeat_interleave(taken, 0) for x in (chains.texts.features, chains.texts.pooled))
        with _attention(before.device):
            velocity = module(before, (times / self.scale).repeat(len(chains.states)), features, pooled)
        velocity = velocity.float().unflatten(0, (-1, taken))
        found = [
            self.scheduler.log_prob(
                velocity[:, k], self.scheduler.timesteps[k], chains.states[:, k], chains.states[:, k + 1], reduce=reduce
            )
            for k in range(taken)
        ]
        return torch.stack(found, 1)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of finished latents."""
        parts = [
            decode_latents(self.pipe.vae, family_of(self.pipe), part, *self.shape[1:]).float()
            for part in latents.split(32)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, module: GuidedVelocity, chains: Chains, noise: Tensor) -> Tensor:
        """In which direction each finished sample would push the last layer: features for G2RL, (B, F).

        The gradient of the matching loss at the sampler's own noise levels, under noise that a group shares.

        Args:
            module: its transformer ends in ``proj_out``.
            chains: B of them.
            noise: (B, C, H, W), the same for all of a group.
        """
        transformer, residuals, patch = module.transformer, [], self.pipe.transformer.config.patch_size
        with LastLayerFeature(transformer.proj_out) as feature, _attention(chains.latents.device):
            for timestep in self.scheduler.timesteps:
                sigma = float(timestep) / self.scale
                noisy = (1 - sigma) * chains.latents + sigma * noise
                sigmas = torch.full((len(noisy),), sigma, device=noisy.device)
                velocity = velocity_of(transformer, noisy, sigmas, chains.texts.features, chains.texts.pooled)
                residuals.append(_patches(velocity.float() - (noise - chains.latents), patch))
        return feature.features(residuals)


def _patches(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, C, H, W) as the rows that the last layer gives: (B, tokens, patch patch C)."""
    return (
        latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )


def _attention(device: torch.device):
    """Fused attention is slow on a CPU at this size, and has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
