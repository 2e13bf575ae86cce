"""EditPipeline on real pipelines of every family, against stock calls and stock image-to-image pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY
from trimtab.pipelines import EditPipeline, FlowOptPipeline, GenerationMap
from trimtab.pipelines.edit_methods import METHODS, schedule_of, velocity_of

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")

FAMILIES = ["sd3", "flux", "qwen-image", "sana", "aura-flow", "lumina-2", "z-image", "flux-2-klein"]
STEPS = 4
# Evaluations a picture of n steps: those under the source prompt, and those under the target prompt.
EVALUATIONS: dict[str, Any] = {
    "sdedit": lambda n: (0, n),
    "ode-inversion": lambda n: (n, n),
    "uni-inv": lambda n: (n + 1, n),
    "rf-inversion": lambda n: (n, n),
    "rf-solver": lambda n: (2 * n, 2 * n),
    "fireflow": lambda n: (n + 1, n + 1),
    "flowedit": lambda n: (n, n),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pipeline(name: str) -> Any:
    pipe = guided_pipeline(name)
    if name == "lumina-2":
        pipe.vae_scale_factor = 2  # a constant of the class, 8, where other classes ask the autoencoder
    return pipe


def size(name: str) -> tuple[int, int]:
    """Height and width that the tiny model is made for."""
    return {"flux-2-klein": (8, 8), "sana": (32, 32)}.get(name, (16, 16))


def picture(name: str, seed: int = 0) -> Image.Image:
    height, width = size(name)
    values = torch.rand(height // 4, width // 4, 3, generator=seeded(seed))
    return Image.fromarray((values * 255).byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


def fixed(name: str) -> dict[str, Any]:
    height, width = size(name)
    kept = {k: v for k, v in GUIDED[name].fixed.items() if k not in ("height", "width", "negative_prompt")}
    return {**kept, "height": height, "width": width}


def prompts(name: str, source: int = 0, target: int = 1) -> dict[str, Any]:
    """Arguments that hold the two prompts, as text or as embeddings."""
    given, wanted = GUIDED[name].prompts([source]), GUIDED[name].prompts([target])
    if "prompt" in given:
        return {"prompt": wanted["prompt"], "source_prompt": given["prompt"]}
    return {"prompt": None, "source_prompt": None, **wanted, "source_kwargs": given}


def edit(name: str, method: str, pipe: Any = None, **options: Any) -> Any:
    arguments = {"image": picture(name), "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"}
    pipe = pipeline(name) if pipe is None else pipe
    return EditPipeline(pipe, method)(**(arguments | prompts(name) | fixed(name) | options))


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


# ---- the velocity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_velocity_is_what_the_stock_call_hands_to_its_scheduler(name: str) -> None:
    pipe = pipeline(name)
    call = GUIDED[name].call([0, 1], 3.0) | {k: v for k, v in fixed(name).items() if k in ("height", "width")}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    f = GenerationMap(pipe, num_inference_steps=3, output="latent", scheduler=scheduler, **call)
    z = f.sample_latents(2, seeded())
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    step = pipe.scheduler.step

    def recording(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        seen.append((model_output, sample))
        return step(model_output, timestep, sample, **options)

    pipe.scheduler.step = recording
    pipe(**call, num_inference_steps=3, latents=z, output_type="latent")
    del pipe.scheduler.step
    sigmas = schedule_of(f, z, 0).sigmas
    assert torch.equal(sigmas, pipe.scheduler.sigmas)
    velocity = velocity_of(f)
    for (expected, sample), sigma in zip(seen, sigmas, strict=False):
        as_passed = [t if t.shape == z.shape else t.transpose(1, 2).reshape(z.shape) for t in (expected, sample)]
        torch.testing.assert_close(velocity(as_passed[1], sigma), as_passed[0], rtol=1e-5, atol=1e-5)


def test_schedule_of_the_rest_is_cut_and_nothing_stays() -> None:
    pipe = pipeline("qwen-image")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    call = GUIDED["qwen-image"].call([0])
    f = GenerationMap(pipe, num_inference_steps=5, output="latent", scheduler=scheduler, **call)
    z = f.sample_latents(1, seeded())
    before = dict(vars(scheduler)), dict(vars(pipe))
    rest, whole = schedule_of(f, z, 2), schedule_of(f, z, 0)
    assert torch.equal(rest.sigmas, whole.sigmas[2:])
    assert torch.equal(rest.timesteps, whole.timesteps[2:])
    assert (dict(vars(scheduler)), dict(vars(pipe))) == before


# ---- methods on the families -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, method", [*((name, "flowedit") for name in FAMILIES), *(("sd3", m) for m in METHODS)])
def test_edits_and_counts(name: str, method: str) -> None:
    out = edit(name, method, strength=0.75)
    height, width = size(name)
    assert out.images.shape == (1, 3, height, width)
    assert out.images.min() >= 0 and out.images.max() <= 1
    assert out.latents.dtype == torch.float32
    source, target = EVALUATIONS[method](3)
    guided = 1 if name == "flux" else 2  # its guidance is an input of the network
    assert out.num_function_evaluations == source + guided * target
    again = edit(name, method, strength=0.75)
    assert torch.equal(out.latents, again.latents)


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_prompts_leave_flowedit_where_it_was(name: str) -> None:
    """The autoencoder's round trip is what is left."""
    pipe = pipeline(name)
    out = edit(name, "flowedit", pipe, **prompts(name, 1, 1), guidance_scale=1.0)
    sources = prompts(name)
    f = GenerationMap(
        pipe,
        sources["prompt"][0] if sources["prompt"] else None,
        output="latent",
        **{k: v for k, v in sources.items() if k not in ("prompt", "source_prompt", "source_kwargs")},
        **fixed(name),
    )
    y = f.encode(as_tensor(name))
    torch.testing.assert_close(out.latents, y, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.images, f.decode(y), rtol=0, atol=1e-4)


def as_tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(name))).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_sdedit_is_the_stock_image_to_image_pipeline(name: str) -> None:
    pipe = pipeline(name)
    classes = {"sd3": diffusers.StableDiffusion3Img2ImgPipeline, "sd15": diffusers.StableDiffusionImg2ImgPipeline}
    f = GenerationMap(pipe, "a cat", output="latent", **fixed(name))
    y = f.encode(as_tensor(name))
    stock = classes[name](**{k: v for k, v in pipe.components.items() if k != "image_encoder" or v is not None})
    stock.set_progress_bar_config(disable=True)
    call = {k: v for k, v in fixed(name).items() if k not in ("height", "width")}
    expected = stock(
        prompt="a dog", image=y, strength=0.75, num_inference_steps=8, guidance_scale=3.0, generator=seeded(),
        output_type="latent", **call,
    ).images  # fmt: skip
    out = edit(name, "sdedit", pipe, prompt="a dog", strength=0.75, num_inference_steps=8, generator=seeded())
    torch.testing.assert_close(out.latents, expected, rtol=1e-4, atol=1e-4)


def test_sdedit_at_hardly_any_noise_is_the_round_trip() -> None:
    pipe = pipeline("sd3")
    y = GenerationMap(pipe, "a cat", output="latent", **fixed("sd3")).encode(as_tensor("sd3"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # no shift: the last step begins at 0.001
    moved = [
        rms(edit("sd3", "sdedit", pipe, strength=strength, num_inference_steps=1000).latents - y)
        for strength in (0.003, 0.001)
    ]
    assert moved[1] < 0.005 and moved[1] < moved[0]


def test_full_pull_of_rf_inversion_gives_the_source_back() -> None:
    pipe = pipeline("sd3")
    y = GenerationMap(pipe, "a cat", output="latent", **fixed("sd3")).encode(as_tensor("sd3"))
    out = edit("sd3", "rf-inversion", pipe, method_kwargs={"eta": 1.0, "stop": 1.0})
    torch.testing.assert_close(out.latents, y, rtol=0, atol=1e-4)


def test_uni_inv_is_flowopt_without_an_update() -> None:
    pipe = pipeline("sd3")
    arguments = {"image": picture("sd3"), "prompt": "a dog", "source_prompt": "a cat", "strength": 0.75}
    arguments |= {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"} | fixed("sd3")
    ours = EditPipeline(pipe, "uni-inv")(**arguments)
    flowopt = FlowOptPipeline.from_pipe(pipe)(**arguments, num_optimization_steps=0, step_size=1.0)
    torch.testing.assert_close(ours.latents, flowopt.latents, rtol=0, atol=1e-6)
    assert ours.num_function_evaluations == flowopt.num_function_evaluations


@pytest.mark.parametrize("method", ["rf-solver", "fireflow", "uni-inv"])
def test_better_solvers_come_back_nearer(method: str) -> None:
    """Inverted and sampled under one prompt without guidance, the source should return."""
    pipe = pipeline("sd3")
    y = GenerationMap(pipe, "a cat", output="latent", **fixed("sd3")).encode(as_tensor("sd3"))
    same = prompts("sd3", 1, 1) | {"guidance_scale": 1.0, "num_inference_steps": 8}
    assert rms(edit("sd3", method, pipe, **same).latents - y) < 0.5 * rms(
        edit("sd3", "ode-inversion", pipe, **same).latents - y
    )


@pytest.mark.parametrize("method", ["sdedit", "rf-inversion", "flowedit", "fireflow"])
def test_a_batch_is_its_pictures(method: str) -> None:
    pipe = pipeline("sd3")
    images = [picture("sd3", 0), picture("sd3", 1)]
    texts = {"prompt": ["a dog", "an owl"], "source_prompt": ["a cat", "a fox"]}
    both = edit("sd3", method, pipe, image=images, **texts, generator=[seeded(3), seeded(4)])
    assert both.latents.shape[0] == 2
    for row in range(2):
        single = {key: value[row] for key, value in texts.items()}
        one = edit("sd3", method, pipe, image=images[row], **single, generator=seeded(3 + row))
        torch.testing.assert_close(both.latents[row : row + 1], one.latents, rtol=1e-4, atol=1e-4)
        assert one.num_function_evaluations == both.num_function_evaluations


def test_diffusion_models_invert_by_ddim() -> None:
    pipe = pipeline("sd15")
    same = prompts("sd15", 1, 1) | {"guidance_scale": 1.0}
    y = GenerationMap(pipe, "a cat", output="latent", **fixed("sd15")).encode(as_tensor("sd15"))
    errors = [
        rms(edit("sd15", "ode-inversion", pipe, num_inference_steps=n, strength=0.5, **same).latents - y)
        for n in (10, 40)
    ]
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="`method` is 'flowedit', which is for flows"):
        edit("sd15", "flowedit", pipe)


def test_leaves_the_pipeline_as_it_was() -> None:
    pipe = pipeline("sd3")
    before, state = dict(vars(pipe)), dict(vars(pipe.scheduler))
    for method in METHODS:
        edit("sd3", method, pipe)
    assert dict(vars(pipe)) == before
    assert dict(vars(pipe.scheduler)) == state
    assert not pipe.transformer._forward_pre_hooks


def test_half_precision_keeps_float32_latents() -> None:
    out = edit("sd3", "flowedit", pipeline("sd3").to(torch.bfloat16))
    assert out.latents.dtype == out.images.dtype == torch.float32
    assert out.images.isfinite().all()


def test_outputs() -> None:
    pipe = pipeline("sd3")
    (image,) = edit("sd3", "sdedit", pipe, output_type="pil").images
    assert image.size == (16, 16)
    assert edit("sd3", "sdedit", pipe, output_type="np").images.shape == (1, 16, 16, 3)
    out = edit("sd3", "sdedit", pipe, output_type="latent", return_dict=False)
    assert torch.equal(out[0], out[1]) and out[2] == 2 * 3


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method_kwargs": {"n_max": 3}}, TypeError, "`method_kwargs` has `n_max`; 'flowedit' takes n_avg, n_min"),
        ({"output_type": "jpg"}, ValueError, "`output_type` is 'jpg'"),
        ({"strength": 0.0}, ValueError, "`strength` is 0.0"),
        ({"strength": 1.2}, ValueError, "`strength` is 1.2"),
        ({"prompt": ["a dog", "an owl"]}, ValueError, "`prompt` has 2 prompts for 1 pictures"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "`generator` has 2 generators"),
        ({"n_avg": 2}, TypeError, "`n_avg` is no argument"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        edit("sd3", "flowedit", **options)


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="`method` is 'p2p'; takes one of sdedit, ode-inversion"):
        EditPipeline(pipeline("sd3"), "p2p")
    with pytest.raises(ValueError, match="`pipe` is a WanPipeline, which makes videos"):
        EditPipeline(pipeline("wan"))


def test_every_complete_family_is_tried() -> None:
    assert {name for name in TINY if name not in ("sd15", "sdxl", "pixart-sigma")} <= {*FAMILIES}
