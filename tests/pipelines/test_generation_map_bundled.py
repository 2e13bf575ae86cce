"""GenerationMap on a model loaded from a standard repository: the bundled one."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.pipelines.test_generation_map import seeded
from trimtab.assets import asset_path
from trimtab.pipelines import GenerationMap

CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def repository() -> Path:
    return asset_path("emoji-scenes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_stock_call(repository: Path, dtype: torch.dtype) -> None:
    pipe = DiffusionPipeline.from_pretrained(repository, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    f = GenerationMap(pipe, "a cat", **CALL)
    z = f.sample_latents(2, seeded(0))
    expected = pipe("a cat", latents=z.to(dtype), num_images_per_prompt=2, output_type="pt", **CALL).images.float()
    images = f(z)
    assert images.dtype == torch.float32
    assert torch.equal(images, expected)


def test_gradient_of_parameters_as_they_are_loaded(repository: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(repository, dtype=torch.float32)
    parameters = [p for part in (pipe.transformer, pipe.vae) for p in part.parameters()]
    assert all(p.requires_grad for p in parameters)
    f = GenerationMap(pipe, "a cat", **CALL)
    z = f.sample_latents(1, seeded(0)).requires_grad_()
    images = f(z)
    (images * torch.randn(images.shape, generator=seeded(1))).sum().backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().max() > 0
    assert all(p.requires_grad and p.grad is None for p in parameters)
