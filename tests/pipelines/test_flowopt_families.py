"""FlowOpt in every family: the real classes with tiny random weights, one row each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

import trimtab.pipelines
from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.pipelines.test_generation_map import seeded
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY
from trimtab.assets import asset_path
from trimtab.pipelines import FlowOptPipeline
from trimtab.pipelines.flowopt_schedules import inverse_of, sampler_of
from trimtab.schedulers import start_at

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")

FOLDER = Path(trimtab.pipelines.__file__).parent
STEPS, START = 4, 1
NO_TEXT = {"text_encoder": None, "tokenizer": None}


@dataclass(frozen=True)
class Row:
    """A family: its file, stock class, size of pictures, scale that doesn't guide, and what isn't saved."""

    file: str
    stock: str
    size: tuple[int, int] = (16, 16)
    off: float = 1.0
    missing: dict = field(default_factory=dict)


ROWS = {
    "sd15": Row(
        "flowopt_stable_diffusion",
        "StableDiffusionPipeline",
        missing={"safety_checker": None, "feature_extractor": None},
    ),
    "sdxl": Row("flowopt_stable_diffusion_xl", "StableDiffusionXLPipeline"),
    "sd3": Row("flowopt_stable_diffusion_3", "StableDiffusion3Pipeline"),
    "flux": Row("flowopt_flux", "FluxPipeline"),
    "sana": Row("flowopt_sana", "SanaPipeline", (32, 32)),
    "qwen-image": Row("flowopt_qwen_image", "QwenImagePipeline"),
    "lumina-2": Row("flowopt_lumina_2", "Lumina2Pipeline", missing=NO_TEXT),
    "aura-flow": Row("flowopt_aura_flow", "AuraFlowPipeline", missing=NO_TEXT),
    "z-image": Row("flowopt_z_image", "ZImagePipeline", off=0.0, missing=NO_TEXT),
    "flux-2-klein": Row("flowopt_flux_2_klein", "Flux2KleinPipeline", (8, 8), missing=NO_TEXT),
    "flux-2": Row("flowopt_flux_2", "Flux2Pipeline", (8, 8), missing=NO_TEXT),
}


def stock_pipeline(name: str) -> DiffusionPipeline:
    if name != "flux-2":
        return trimmed(name, guided_pipeline(name))
    klein = guided_pipeline("flux-2-klein")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**klein.transformer.config, "guidance_embeds": True}
        transformer = diffusers.Flux2Transformer2DModel.from_config(config).eval()
    pipe = diffusers.Flux2Pipeline(**{**klein.components, **NO_TEXT, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trimmed(name: str, pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Sizes that the classes hold in attributes, which aren't components."""
    if name in ("flux", "qwen-image"):
        pipe.default_sample_size = 8
    if name == "lumina-2":
        pipe.vae_scale_factor = 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flowopt_class(name: str) -> type:
    return getattr(trimtab.pipelines, f"FlowOpt{ROWS[name].stock}")


def flowopt(name: str, stock: DiffusionPipeline) -> DiffusionPipeline:
    return trimmed(name, FlowOptPipeline.from_pipe(stock))


def prompts(name: str, row: int) -> dict[str, Any]:
    """Arguments of the stock call for a prompt: its text or its embeddings, and what goes with it, but no scale."""
    key = "flux-2-klein" if name == "flux-2" else name
    call = GUIDED[key].call([row])
    call |= {"height": ROWS[name].size[0], "width": ROWS[name].size[1]}
    for argument in ("guidance_scale", "true_cfg_scale", "negative_prompt"):
        call.pop(argument, None)
    if name == "flux-2":
        del call["negative_prompt_embeds"]
    if isinstance(call.get("prompt"), list):
        call["prompt"] = call["prompt"][0]
    return call


def picture(name: str) -> torch.Tensor:
    return (torch.rand(1, 3, *ROWS[name].size, generator=seeded(7)) * 255).round() / 255


def edit_call(name: str) -> dict[str, Any]:
    """Arguments of the edit from prompt 0 to prompt 1."""
    target, source = prompts(name, 1), prompts(name, 0)
    call = {**target, "prompt": target.get("prompt"), "source_prompt": source.get("prompt")}
    if "prompt" not in source:
        for argument in ("height", "width"):
            del source[argument]
        call["source_kwargs"] = source
    return call


@contextmanager
def scheduled(pipe: DiffusionPipeline, scheduler: Any) -> Iterator[None]:
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def by_hand(pipe: DiffusionPipeline, name: str, row: int, scale: float, scheduler: Any, latents: torch.Tensor):
    """The last latents of the stock pipeline's own call with another scheduler, as the call takes them."""
    seen: list[torch.Tensor] = []

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    call = prompts(name, row)
    if name == "qwen-image":
        call |= {"true_cfg_scale": scale, "negative_prompt": " " if scale > 1 else None}
    else:
        call["guidance_scale"] = scale
    with scheduled(pipe, scheduler):
        pipe(**call, num_inference_steps=STEPS, latents=latents, output_type="latent", callback_on_step_end=step_end)
    last = seen[-1]
    return last if last.shape == latents.shape else last.transpose(1, 2).unflatten(2, latents.shape[-2:])


@pytest.fixture(params=ROWS)
def case(request):
    stock = stock_pipeline(request.param)
    return request.param, stock, flowopt(request.param, stock)


def test_the_edit_is_the_loop_by_hand(case):
    """The plain update around the stock pipeline's own call, from the inverse scheduler's start."""
    name, stock, pipe = case
    eta, scale = 0.1, 3.0
    result = pipe(
        image=picture(name),
        strength=1 - START / STEPS,
        num_inference_steps=STEPS,
        num_optimization_steps=2,
        step_size=eta,
        guidance_scale=scale,
        acceleration="none",
        keep_history=True,
        output_type="pt",
        **edit_call(name),
    )
    sampler = sampler_of(stock.scheduler)
    off = ROWS[name].off
    with torch.no_grad():
        y = encoded(pipe, name)
        x = by_hand(stock, name, 0, off, start_at(inverse_of(sampler), START), y)
        for state in result.history:
            torch.testing.assert_close(state.noise, x, rtol=1e-4, atol=1e-5)
            z = by_hand(stock, name, 1, scale + off - 1, start_at(sampler, START), x)
            torch.testing.assert_close(state.latents, z, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(state.residuals, (z - y).square().mean().sqrt()[None], rtol=1e-4, atol=1e-5)
            x = x - eta * (z - y)
    assert torch.equal(result.latents, result.history[-1].latents)
    assert result.images.shape == (1, 3, *ROWS[name].size)
    torch.testing.assert_close(result.images, result.history[-1].images)
    assert result.images.std() > 0.01


def encoded(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    call = prompts(name, 0)
    return trimtab.pipelines.GenerationMap(pipe, **call).encode(picture(name))


def test_evaluations_are_counted(case):
    name, _, pipe = case
    seen = []
    hook = pipe.components["unet" if "unet" in pipe.components else "transformer"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        ),
        with_kwargs=True,
    )
    result = pipe(
        image=picture(name), num_inference_steps=STEPS, num_optimization_steps=1, strength=0.5, step_size=0.1,
        guidance_scale=3.0, output_type="latent", **edit_call(name),
    )  # fmt: skip
    hook.remove()
    assert result.num_function_evaluations == sum(map(len, seen))
    start = 2 if name in ("sd15", "sdxl") else 3
    guided = name not in ("flux", "flux-2")  # their guidance is distilled
    assert result.num_function_evaluations == start + 2 * 2 * (2 if guided else 1)


def test_the_noise_of_an_inversion_gives_the_picture_back(case):
    name, stock, pipe = case
    call = prompts(name, 0)
    result = pipe.invert(
        image=picture(name), prompt=call.pop("prompt", None), num_inference_steps=STEPS, num_optimization_steps=3,
        output_type="latent", **call,
    )  # fmt: skip
    assert result.residuals.shape == (4, 1) and bool((result.residuals.diff(dim=0) <= 0).all())
    if name not in ("sd15", "sdxl", "aura-flow"):  # random networks there are steeper than their inverse can follow
        assert result.residuals[-1] < 0.9 * result.residuals[0]
    sampler = sampler_of(stock.scheduler)
    with torch.no_grad():
        z = by_hand(stock, name, 0, ROWS[name].off, sampler, result.latents)
    torch.testing.assert_close(z, result.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (z - encoded(pipe, name)).square().mean().sqrt(), result.residuals.min(), rtol=0.05, atol=1e-5
    )


def test_weights_are_shared_both_ways(case):
    name, stock, pipe = case
    assert type(pipe) is flowopt_class(name) and isinstance(pipe, getattr(diffusers, ROWS[name].stock))
    assert set(pipe.components) == set(stock.components)
    for key, component in stock.components.items():
        assert pipe.components[key] is component, key
    back = getattr(diffusers, ROWS[name].stock).from_pipe(pipe)
    for key, component in stock.components.items():
        assert back.components[key] is component, key


def test_generate_is_the_stock_call(case):
    name, stock, pipe = case
    own, ours = (
        call(**prompts(name, 0), num_inference_steps=2, output_type="latent", generator=seeded(0), return_dict=False)[0]
        for call in (stock, pipe.generate)
    )
    assert torch.equal(own, ours)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The folder where Diffusers copies custom pipelines to: the test's own."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)
    return folder


def test_loads_as_a_custom_pipeline(case, tmp_path, modules):
    name, stock, pipe = case
    stock.save_pretrained(tmp_path / "stock")
    row = ROWS[name]
    loaded = trimmed(
        name,
        DiffusionPipeline.from_pretrained(
            tmp_path / "stock",
            custom_pipeline=str(FOLDER / f"{row.file}.py"),
            trust_remote_code=True,
            **row.missing,
        ),
    )
    assert type(loaded).__name__ == f"FlowOpt{row.stock}" and type(loaded).__module__.startswith("diffusers_modules")
    run = {"num_inference_steps": 2, "num_optimization_steps": 1, "step_size": 0.1, "output_type": "latent"}
    results = [p(image=picture(name), **edit_call(name), **run).latents for p in (loaded, pipe)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_every_file_is_in_the_table():
    found = {path.stem for path in FOLDER.glob("flowopt_*.py") if "Pipeline(FlowOptPipelineMixin, " in path.read_text()}
    assert found == {row.file for row in ROWS.values()}
    assert set(trimtab.pipelines._FLOWOPT) == {f"FlowOpt{row.stock}" for row in ROWS.values()}
    assert {"FlowOptPipeline", *trimtab.pipelines._FLOWOPT} <= set(dir(trimtab.pipelines))


def test_the_bundled_model_loads_as_a_custom_pipeline(modules):
    pipe = DiffusionPipeline.from_pretrained(
        asset_path("emoji-scenes"),
        custom_pipeline=str(FOLDER / "flowopt_stable_diffusion_3.py"),
        trust_remote_code=True,
    )
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        image=torch.full((3, 128, 128), 0.8), prompt="a cat on a sky background", source_prompt="a dog",
        num_inference_steps=2, strength=0.5, num_optimization_steps=0, max_sequence_length=16,
    )  # fmt: skip
    assert result.images[0].size == (128, 128)


def test_a_family_without_a_class_is_named():
    with pytest.raises(ValueError, match="`pipeline` is a PixArtSigmaPipeline, which isn't edited here; takes .*Flux2"):
        FlowOptPipeline.from_pipe(guided_pipeline("pixart-sigma"))
    assert set(TINY) - {"pixart-sigma"} <= set(ROWS)
