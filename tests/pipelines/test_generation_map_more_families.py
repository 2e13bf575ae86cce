"""GenerationMap against the stock call of the families whose tiny pipelines take prompts as embeddings."""

from typing import Any

import diffusers
import pytest
import torch

from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.pipelines.test_generation_map import seeded
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY
from trimtab.pipelines import GenerationMap

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")

MORE = [name for name in GUIDED if name not in TINY]


def call(name: str, rows: list[int]) -> dict[str, Any]:
    """Arguments of the stock call for these prompts, of a size that fits the tiny autoencoder's."""
    size = {"height": 16, "width": 16} if name == "lumina-2" else {}
    return GUIDED[name].call(rows) | size


def pipeline(name: str) -> Any:
    pipe = guided_pipeline(name)
    if name == "lumina-2":
        pipe.vae_scale_factor = 2  # a constant of the class, 8, where other classes ask the autoencoder
    if name == "hunyuan-dit":  # without noise of its own in the loop, which the stock call draws from anywhere
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def stock(f: GenerationMap, name: str, rows: list[int], output_type: str, **options: Any) -> torch.Tensor:
    arguments = call(name, rows) | options
    return f.pipe(**arguments, num_inference_steps=2, output_type=output_type, return_dict=False)[0]


@pytest.mark.parametrize("name", MORE)
def test_equals_the_stock_call(name: str) -> None:
    f = GenerationMap(pipeline(name), num_inference_steps=2, **call(name, [0, 1]))
    assert f.num_prompts == 2
    assert f.latent_shape == GUIDED[name].latent_shape
    z = f.sample_latents(2, seeded(0))
    images = f(z)
    assert images.shape == (2, *f.image_shape)
    assert images.std() > 0.01
    torch.testing.assert_close(images, stock(f, name, [0, 1], "pt", latents=z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images, stock(f, name, [0, 1], "pt", generator=seeded(0)), rtol=1e-5, atol=1e-5)
    f.output = "latent"
    latents = f(z)
    assert latents.shape == z.shape
    torch.testing.assert_close(f.decode(latents), images, rtol=1e-5, atol=1e-5)
    if f.family.returns_latents:
        torch.testing.assert_close(latents, stock(f, name, [0, 1], "latent", latents=z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(f(z[1:], prompt_index=[1]), latents[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MORE)
def test_gradient(name: str) -> None:
    f = GenerationMap(pipeline(name), num_inference_steps=2, output="latent", **call(name, [0]))
    z = f.sample_latents(1, seeded(0)).requires_grad_()
    weights = torch.randn(z.shape, generator=seeded(1))
    (grad,) = torch.autograd.grad((f(z) * weights).sum(), z)
    direction, step = grad / grad.norm(), 1e-2
    with torch.no_grad():
        difference = ((f(z + step * direction) - f(z - step * direction)) * weights).sum() / (2 * step)
    assert abs(difference / grad.norm() - 1) < 1e-2


@pytest.mark.parametrize("name", MORE)
def test_encoded_pictures_come_back(name: str) -> None:
    """What the decoder gets is what the encoder gave: the maps between them are inverse to each other."""
    f = GenerationMap(pipeline(name), num_inference_steps=2, **call(name, [0]))
    given: list[torch.Tensor] = []
    decode, encode = f.pipe.vae.decode, f.pipe.vae.encode
    try:
        f.pipe.vae.decode = lambda z, **options: given.append(z) or decode(z, **options)
        f.pipe.vae.encode = lambda x: given.append(encode(x)) or given[-1]
        z = f.encode(torch.rand(1, *f.image_shape, generator=seeded(0)))
        assert z.shape == (1, *f.latent_shape)
        f.decode(z)
    finally:
        del f.pipe.vae.decode, f.pipe.vae.encode
    torch.testing.assert_close(given[1], given[0].latent_dist.mode(), rtol=1e-4, atol=1e-5)
