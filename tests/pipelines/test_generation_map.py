"""GenerationMap against the stock call of every family, with the same latents: equal bit for bit."""

import diffusers
import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY, tiny_pipeline
from trimtab.pipelines import GenerationMap
from trimtab.pipelines.families import denoisers_of
from trimtab.pipelines.latents import from_tokens, to_tokens

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

STEPS = 3
PROMPTS = ["a red cat", "two dog on a sky background"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_map(name: str, prompt: str | list[str] = "a red cat", **options) -> GenerationMap:
    arguments = {"num_inference_steps": STEPS} | TINY[name].call | options
    return GenerationMap(arguments.pop("pipe", None) or tiny_pipeline(name), prompt, **arguments)


def stock(f: GenerationMap, name: str, prompt: str | list[str], output_type: str, **options) -> torch.Tensor:
    arguments = {"num_inference_steps": STEPS} | TINY[name].call | options
    return f.pipe(prompt, output_type=output_type, **arguments).images


@pytest.mark.parametrize("name", TINY)
class TestEveryFamily:
    def test_equals_the_stock_call(self, name: str) -> None:
        f = tiny_map(name)
        assert f.latent_shape == TINY[name].latent_shape
        assert (f.height, f.width) == TINY[name].size
        z = f.sample_latents(2, seeded(0))
        images = f(z)
        assert images.shape == (2, 3, *TINY[name].size)
        assert images.std() > 0.01
        torch.testing.assert_close(
            images, stock(f, name, "a red cat", "pt", latents=z, num_images_per_prompt=2), rtol=1e-5, atol=1e-5
        )

    def test_latents_equal_the_stock_call_and_decode_to_its_images(self, name: str) -> None:
        f = tiny_map(name, output="latent")
        z = f.sample_latents(2, seeded(0))
        latents = f(z)
        assert latents.shape == z.shape
        options = {"latents": z, "num_images_per_prompt": 2}
        torch.testing.assert_close(latents, stock(f, name, "a red cat", "latent", **options), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            f.decode(latents), stock(f, name, "a red cat", "pt", **options), rtol=1e-5, atol=1e-5
        )

    def test_a_prompt_for_each_row(self, name: str) -> None:
        f = tiny_map(name, PROMPTS)
        assert f.num_prompts == 2
        z = f.sample_latents(2, seeded(1))
        negative = TINY[name].call.get("negative_prompt")
        options = {} if negative is None else {"negative_prompt": [negative] * 2}
        torch.testing.assert_close(f(z), stock(f, name, PROMPTS, "pt", latents=z, **options), rtol=1e-5, atol=1e-5)

    def test_draws_the_noise_that_the_pipeline_draws(self, name: str) -> None:
        f = tiny_map(name)
        z = f.sample_latents(1, seeded(5))
        assert z.dtype == torch.float32
        torch.testing.assert_close(f(z), stock(f, name, "a red cat", "pt", generator=seeded(5)), rtol=1e-5, atol=1e-5)
        pair = f.sample_latents(2, [seeded(6), seeded(5)])
        assert torch.equal(pair[1:], z)
        assert abs(f.sample_latents(64, seeded(0)).std().item() - 1) < 0.02

    def test_batch_is_its_items(self, name: str) -> None:
        f = tiny_map(name, PROMPTS, output="latent")
        z = f.sample_latents(2, seeded(2))
        batch = f(z)
        for i, prompt in enumerate(PROMPTS):
            alone = tiny_map(name, prompt, output="latent")(z[i : i + 1])
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)

    def test_chosen_prompts(self, name: str) -> None:
        f = tiny_map(name, PROMPTS, output="latent")
        z = f.sample_latents(3, seeded(3))
        crossed = f(z, prompt_index=[1, 1, 0])
        torch.testing.assert_close(crossed[1:], f(z[1:], prompt_index=[1, 0]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(crossed[1:].flip(0), f(z[1:].flip(0)), rtol=1e-4, atol=1e-5)

    def test_text_encoders_run_once_and_denoisers_as_the_stock_loop_says(self, name: str) -> None:
        pipe, calls = tiny_pipeline(name), []
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.register_forward_hook(lambda module, args, output: calls.append(module))
        f = tiny_map(name, pipe=pipe)
        assert calls and not {pipe.vae, *denoisers_of(f.pipe)} & set(calls)
        calls.clear()
        stock(f, name, "a red cat", "latent")
        stock_calls = sum(module in denoisers_of(f.pipe) for module in calls)
        calls.clear()
        f.output = "latent"
        f(f.sample_latents(1, seeded(0)))
        assert set(calls) == set(denoisers_of(f.pipe))
        assert len(calls) == stock_calls >= STEPS

    def test_encoded_pictures_come_back(self, name: str) -> None:
        """A random autoencoder keeps no picture, but the linear maps around it must be inverse to each other."""
        f = tiny_map(name)
        z = f.encode(torch.full((2, 3, *TINY[name].size), 0.25))
        assert z.shape == (2, *f.latent_shape)
        images, seen = torch.rand(2, 3, *TINY[name].size, generator=seeded(0)), []
        decoder = f.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        encoder = f.pipe.vae.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
        f.decode(f.encode(images))
        decoder.remove(), encoder.remove()
        if not any(getattr(f.pipe.vae, part, None) for part in ("quant_conv", "post_quant_conv")):
            mode = seen[0][:, : seen[1].shape[1]]
            torch.testing.assert_close(seen[1].reshape(mode.shape), mode, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd3", "qwen-image"])
def test_half_precision_model_with_float32_latents(name: str) -> None:
    f = tiny_map(name, pipe=tiny_pipeline(name, dtype=torch.bfloat16))
    z = f.sample_latents(2, seeded(0))
    images = f(z)
    assert images.dtype == z.dtype == torch.float32
    expected = stock(f, name, "a red cat", "pt", latents=z.bfloat16(), num_images_per_prompt=2)
    assert torch.equal(images, expected.float())
    assert f(z.bfloat16()).dtype == torch.bfloat16


def test_float16_autoencoder_that_needs_float32_stays_as_it_is() -> None:
    pipe = tiny_pipeline("sdxl")
    f = tiny_map("sdxl", pipe=pipe)
    z = f.sample_latents(1, seeded(0))
    expected = f(z)
    pipe.vae.half()
    torch.testing.assert_close(f(z), expected, rtol=0, atol=2e-3)
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart-sigma"])
def test_prompt_embeddings_instead_of_prompts(name: str) -> None:
    f = tiny_map(name)
    z = f.sample_latents(3, seeded(0))
    names = [n for n in f.family.prompt_outputs if n not in f.family.shared_outputs]
    (encoding,) = f._preparation.encodings
    embeddings = dict(zip(names, encoding, strict=False))
    assert torch.equal(tiny_map(name, None, pipe=f.pipe, **embeddings)(z), f(z))


def test_size_is_the_one_asked_for() -> None:
    for name in ("sd15", "flux", "pixart-sigma"):
        f = tiny_map(name, height=32, width=16)
        z = f.sample_latents(1, seeded(0))
        assert f(z).shape == (1, 3, 32, 16)
        expected = stock(f, name, "a red cat", "pt", latents=z, height=32, width=16)
        assert torch.equal(f(z), expected)


def test_another_scheduler_runs_for_the_call_only() -> None:
    f = tiny_map("sd15")
    own = f.pipe.scheduler
    other = diffusers.DPMSolverMultistepScheduler.from_config(own.config)
    g = tiny_map("sd15", pipe=f.pipe, scheduler=other)
    z = f.sample_latents(1, seeded(0))
    swapped = g(z)
    assert f.pipe.scheduler is own
    assert not torch.allclose(swapped, f(z), atol=1e-3)
    f.pipe.scheduler = other
    assert torch.equal(swapped, f(z))


def test_noise_within_the_loop_is_part_of_the_map() -> None:
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = seeded(7)
    f = tiny_map("sdxl", pipe=pipe, generator=generator)
    z = f.sample_latents(1, seeded(0))
    images = f(z)
    assert torch.equal(images, f(z))
    assert torch.equal(images, stock(f, "sdxl", "a red cat", "pt", latents=z, generator=seeded(7)))
    assert torch.equal(generator.get_state(), seeded(7).get_state())
    torch.testing.assert_close(f(z.expand(2, -1, -1, -1)), images.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(images, tiny_map("sdxl", pipe=pipe, generator=seeded(8))(z), atol=1e-3)
    two = tiny_map("sdxl", PROMPTS, pipe=pipe, generator=[seeded(8), seeded(7)], output="latent")
    row = tiny_map("sdxl", PROMPTS[1], pipe=pipe, generator=seeded(7), output="latent")
    torch.testing.assert_close(two(z.expand(2, -1, -1, -1))[1:], row(z), rtol=1e-4, atol=1e-4)


def test_a_subclass_runs_the_stock_call() -> None:
    class Custom(diffusers.StableDiffusion3Pipeline):
        def __call__(self, *args, **kwargs):
            raise AssertionError("the subclass's own call")

    pipe = tiny_pipeline("sd3")
    custom = Custom(**pipe.components)
    z = tiny_map("sd3", pipe=pipe).sample_latents(1, seeded(0))
    assert torch.equal(tiny_map("sd3", pipe=custom)(z), tiny_map("sd3", pipe=pipe)(z))


def test_tokens_are_cut_as_the_stock_pipelines_cut_them() -> None:
    z = torch.randn(2, 4, 6, 8, generator=seeded(0))
    tokens = to_tokens(z, 2)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(z, 2, 4, 6, 8))
    assert torch.equal(tokens, diffusers.QwenImagePipeline._pack_latents(z, 2, 4, 6, 8))
    back = from_tokens(tokens, 2, 6, 8)
    assert torch.equal(back, z.unsqueeze(2))
    assert torch.equal(back[:, :, 0], diffusers.FluxPipeline._unpack_latents(tokens, 12, 16, 2))
    assert torch.equal(back, diffusers.QwenImagePipeline._unpack_latents(tokens, 12, 16, 2))
    video = torch.randn(2, 4, 3, 6, 8, generator=seeded(0))
    tokens = to_tokens(video, 2)
    assert torch.equal(tokens, diffusers.LTXPipeline._pack_latents(video, 2, 1))
    assert torch.equal(from_tokens(tokens, 2, 6, 8), video)
