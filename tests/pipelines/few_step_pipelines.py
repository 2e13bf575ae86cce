"""Tiny random pipelines of few-step models: a family's classes with the scheduler that the distilled model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.tiny_pipelines import TINY, tiny_pipeline


def _with_scheduler(name: str, cls: type, **changes: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        pipe = tiny_pipeline(name)
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
        return pipe

    return build


def pixart_dmd() -> DiffusionPipeline:
    sigma = tiny_pipeline("pixart-sigma")
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon", clip_sample=False
    )
    parts = {**sigma.components, "scheduler": scheduler}
    pipe = diffusers.PixArtAlphaPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana_sprint() -> DiffusionPipeline:
    sana = tiny_pipeline("sana")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {key: value for key, value in sana.transformer.config.items() if not key.startswith("_")}
        transformer = diffusers.SanaTransformer2DModel(**config | {"guidance_embeds": True}).eval()
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=sana.tokenizer,
        text_encoder=sana.text_encoder,
        vae=sana.vae,
        transformer=transformer,
        scheduler=diffusers.SCMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class FewStepCase:
    """A pipeline, its class for noise optimization, and how it is called.

    Attributes:
        build: makes the stock pipeline.
        file: of its custom pipeline, or None where the class is made as it is needed.
        call: arguments of the stock call besides the prompt.
        prompt: what is asked for, or None where `call` has embeddings.
    """

    build: Callable[[], DiffusionPipeline]
    file: str | None
    call: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = "a red cat"


_SHORT = {"max_sequence_length": 16}
_NO_BINNING = {"use_resolution_binning": False, "clean_caption": False}
_SANA = {"height": 32, "width": 32, "complex_human_instruction": None, **_NO_BINNING, **_SHORT}
_ONE = {"num_inference_steps": 1, "guidance_scale": 0.0}

FEW_STEP: dict[str, FewStepCase] = {
    "sd-turbo": FewStepCase(
        _with_scheduler("sd15", diffusers.EulerDiscreteScheduler, timestep_spacing="trailing"),
        "noise_optimization_stable_diffusion",
        _ONE,
    ),
    "sd15 with guidance": FewStepCase(
        lambda: tiny_pipeline("sd15"),
        "noise_optimization_stable_diffusion",
        {"num_inference_steps": 3, "guidance_scale": 5.0},
    ),
    "sdxl-turbo": FewStepCase(
        _with_scheduler("sdxl", diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="trailing"),
        "noise_optimization_stable_diffusion_xl",
        _ONE | {"num_inference_steps": 2},
    ),
    "hyper-sdxl": FewStepCase(
        _with_scheduler("sdxl", diffusers.LCMScheduler),
        "noise_optimization_stable_diffusion_xl",
        {"timesteps": [800], "guidance_scale": 0.0},
    ),
    "pixart-dmd": FewStepCase(
        pixart_dmd,
        "noise_optimization_pixart_alpha",
        {"timesteps": [400], "num_inference_steps": 1, "guidance_scale": 1.0, **_NO_BINNING, **_SHORT},
    ),
    "pixart-sigma": FewStepCase(
        lambda: tiny_pipeline("pixart-sigma"),
        "noise_optimization_pixart_sigma",
        {"num_inference_steps": 2, **TINY["pixart-sigma"].call},
    ),
    "sd3.5-turbo": FewStepCase(
        lambda: tiny_pipeline("sd3"),
        "noise_optimization_stable_diffusion_3",
        {"num_inference_steps": 4, "guidance_scale": 0.0, **_SHORT},
    ),
    "flux-schnell": FewStepCase(
        lambda: tiny_pipeline("flux"), "noise_optimization_flux", {"num_inference_steps": 1, **_SHORT}
    ),
    "sana": FewStepCase(
        lambda: tiny_pipeline("sana"), "noise_optimization_sana", {"num_inference_steps": 2, **TINY["sana"].call}
    ),
    "sana-sprint": FewStepCase(
        sana_sprint, "noise_optimization_sana_sprint", {"num_inference_steps": 2, "guidance_scale": 4.5, **_SANA}
    ),
    "z-image-turbo": FewStepCase(
        lambda: guided_pipeline("z-image"),
        "noise_optimization_z_image",
        {**GUIDED["z-image"].call([0], 0.0), "num_inference_steps": 2},
        prompt=None,
    ),
    "qwen-image": FewStepCase(
        lambda: tiny_pipeline("qwen-image"), None, {"num_inference_steps": 2, **TINY["qwen-image"].call}
    ),
}
