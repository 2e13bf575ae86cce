"""Guided pipelines in every family: the real classes with tiny random weights, one row each."""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

import trimtab.pipelines
from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    FrequencyDecoupledGuidance,
    Guidance,
    GuidanceRescale,
    attach,
)
from trimtab.pipelines.guided import GuidedPipelineMixin, at_scale

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

FOLDER = Path(trimtab.pipelines.__file__).parent
RMS = 0.0586


def apg(scale, **settings):
    return AdaptiveProjectedGuidance(scale, **settings)


@dataclass(frozen=True)
class Row:
    """A family: its file, the guider expected at first, and what can't be saved of its tiny pipeline."""

    file: str
    stock: str
    guider: Guidance
    missing: dict = field(default_factory=dict)


ROWS = {
    "sd15": Row(
        "guided_stable_diffusion",
        "StableDiffusionPipeline",
        AdaptiveProjectedGuidance.from_preset("sd2.1"),
        {"safety_checker": None, "feature_extractor": None},
    ),
    "sdxl": Row(
        "guided_stable_diffusion_xl", "StableDiffusionXLPipeline", AdaptiveProjectedGuidance.from_preset("sdxl")
    ),
    "sd3": Row("guided_stable_diffusion_3", "StableDiffusion3Pipeline", AdaptiveProjectedGuidance.from_preset("sd3")),
    "flux": Row("guided_flux", "FluxPipeline", apg(2.0, adaptive_projected_guidance_rescale_rms=RMS)),
    "pixart-sigma": Row(
        "guided_pixart_sigma", "PixArtSigmaPipeline", apg(4.5, adaptive_projected_guidance_rescale_rms=RMS)
    ),
    "sana": Row("guided_sana", "SanaPipeline", apg(4.5, adaptive_projected_guidance_rescale_rms=RMS)),
    "qwen-image": Row("guided_qwen_image", "QwenImagePipeline", apg(4.0, adaptive_projected_guidance_rescale_rms=RMS)),
    "wan": Row(
        "guided_wan",
        "WanPipeline",
        apg(5.0, adaptive_projected_guidance_rescale_rms=RMS),
        {"text_encoder": None, "tokenizer": None},
    ),
}


@pytest.fixture(params=ROWS)
def case(request):
    """(name, stock pipeline, guided pipeline of the same components)"""
    stock = guided_pipeline(request.param)
    return request.param, stock, guided(request.param, stock)


@pytest.fixture
def sd3():
    stock = guided_pipeline("sd3")
    return stock, guided("sd3", stock)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The folder where Diffusers copies custom pipelines to: the test's own."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)
    return folder


def guided_class(name):
    return getattr(trimtab.pipelines, f"Guided{ROWS[name].stock}")


def guided(name, stock, **components):
    pipe = guided_class(name).from_pipe(stock, **components)
    pipe.set_progress_bar_config(disable=True)
    return trimmed(name, pipe)


def trimmed(name, pipe):
    """FLUX.1 and Qwen-Image hold the size of their pictures in an attribute that isn't saved."""
    if name in ("flux", "qwen-image"):
        pipe.default_sample_size = 8
    return pipe


def run(pipe, name, **extra):
    """The call, with the scale only where it is given."""
    call = {**GUIDED[name].call([0]), **extra}
    if GUIDED[name].argument not in extra:
        del call[GUIDED[name].argument]
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=3, output_type="latent", generator=generator)[0]


def settings(guider):
    """A guider's config without what loading adds to it."""
    return {key: value for key, value in guider.config.items() if not key.startswith("_")}


def scale(name, value):
    return {GUIDED[name].argument: value}


# ---- every family ------------------------------------------------------------------------------------------


def test_the_default_call_is_guided_by_the_preset(case):
    name, stock, pipe = case
    assert settings(pipe.guider) == settings(ROWS[name].guider)
    result = run(pipe, name)
    with attach(stock, ROWS[name].guider):
        expected = run(stock, name, **scale(name, 2.0))
    assert torch.equal(result, expected)
    plain = run(stock, name, **scale(name, ROWS[name].guider.guidance_scale))
    assert (result - plain).abs().max() > 1e-4 * plain.abs().max()


def test_plain_guidance_is_the_stock_call(case):
    name, stock, pipe = case
    own = run(stock, name, **scale(name, 5.0))
    close = {"rtol": 0.0, "atol": 1e-5 * own.abs().max().item()}
    torch.testing.assert_close(run(pipe, name, guider=ClassifierFreeGuidance(5.0)), own, **close)
    torch.testing.assert_close(run(pipe, name, guider=ClassifierFreeGuidance(9.0), **scale(name, 5.0)), own, **close)
    assert settings(pipe.guider) == settings(ROWS[name].guider)  # that was for these calls


def test_a_scale_of_one_or_less_is_no_guidance(case):
    name, stock, pipe = case
    off = run(stock, name, **scale(name, 1.0))
    for value in (1.0, 0.5):
        assert torch.equal(run(pipe, name, **scale(name, value)), off)
    assert not torch.equal(run(pipe, name), off)


def test_loads_as_a_custom_pipeline_and_keeps_its_guider(case, tmp_path, modules):
    name, stock, _ = case
    row = ROWS[name]
    stock.save_pretrained(tmp_path / "stock")
    custom = {"custom_pipeline": str(FOLDER / f"{row.file}.py"), "trust_remote_code": True, **row.missing}
    pipe = trimmed(name, DiffusionPipeline.from_pretrained(tmp_path / "stock", **custom))
    assert type(pipe).__name__ == f"Guided{row.stock}" and type(pipe).__module__.startswith("diffusers_modules")
    # Kernels may sum in another order where the loaded weights lie in memory otherwise.
    torch.testing.assert_close(run(pipe, name), run(guided(name, stock), name), rtol=1e-3, atol=1e-3)

    pipe.guider = GuidanceRescale(guider=apg(6.0, eta=0.25, adaptive_projected_guidance_momentum=-0.3, start=0.1))
    pipe.save_pretrained(tmp_path / "guided")
    again = DiffusionPipeline.from_pretrained(tmp_path / "guided", **custom)
    imported = guided_class(name).from_pretrained(tmp_path / "guided", **row.missing)
    for loaded in (again, imported):
        assert type(loaded.guider) is GuidanceRescale
        assert settings(loaded.guider) == settings(pipe.guider)
        torch.testing.assert_close(run(trimmed(name, loaded), name), run(pipe, name), rtol=1e-3, atol=1e-3)


def test_from_pipe_goes_both_ways_and_shares_all(case):
    name, stock, pipe = case
    for key, component in stock.components.items():
        assert pipe.components[key] is component, key
    back = trimmed(name, getattr(diffusers, ROWS[name].stock).from_pipe(pipe))
    back.set_progress_bar_config(disable=True)
    assert type(back) is type(stock) and set(back.components) == set(stock.components)
    for key, component in stock.components.items():
        assert back.components[key] is component, key
    assert torch.equal(run(back, name, **scale(name, 5.0)), run(stock, name, **scale(name, 5.0)))
    assert settings(guided(name, back).guider) == settings(ROWS[name].guider)
    guider = ClassifierFreeGuidance(3.0)
    assert guided(name, guided(name, stock, guider=guider)).guider is guider


def test_signatures_are_the_stock_ones_and_the_guider(case):
    name, stock, pipe = case
    stock_init, init = (inspect.signature(type(p).__init__).parameters for p in (stock, pipe))
    assert list(init) == [*stock_init, "guider"]
    stock_call, call = (inspect.signature(type(p).__call__).parameters for p in (stock, pipe))
    assert set(call) == {*stock_call, "guider"}
    changed = {key for key in stock_call if stock_call[key] != call[key]}
    assert changed == {GUIDED[name].argument} and call[GUIDED[name].argument].default is None
    assert "guider: the rule for this call" in type(pipe).__call__.__doc__
    assert type(stock).__call__.__doc__.strip().splitlines()[0] in type(pipe).__call__.__doc__


def test_nothing_is_left_after_a_call(case):
    name, stock, pipe = case
    own = run(stock, name, **scale(name, 5.0))
    before = set(vars(pipe.scheduler))
    run(pipe, name)
    run(pipe, name)
    assert set(vars(pipe.scheduler)) - before <= {"model_outputs", "timestep_list"}
    assert torch.equal(run(stock, name, **scale(name, 5.0)), own)


# ---- once --------------------------------------------------------------------------------------------------


def test_every_file_is_in_the_table():
    assert {path.stem for path in FOLDER.glob("guided_*.py")} == {row.file for row in ROWS.values()}
    assert set(trimtab.pipelines._GUIDED) == {f"Guided{row.stock}" for row in ROWS.values()}
    assert set(trimtab.pipelines._GUIDED) <= set(dir(trimtab.pipelines))
    with pytest.raises(AttributeError, match="has no attribute 'GuidedNothing'"):
        trimtab.pipelines.GuidedNothing  # noqa: B018


def test_code_is_not_run_unless_trusted(sd3, tmp_path, modules):
    sd3[0].save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(
            tmp_path / "stock", custom_pipeline=str(FOLDER / "guided_stable_diffusion_3.py")
        )


def test_a_saved_guided_pipeline_is_a_stock_repository_too(sd3, tmp_path):
    stock, pipe = sd3
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["guider"] == ["trimtab.guidance.adaptive_projected", "AdaptiveProjectedGuidance"]
    assert (tmp_path / "guider" / "guider_config.json").is_file()
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    own, other = (run(p, "sd3", guidance_scale=5.0) for p in (stock, again))
    torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-3)


def test_a_guider_is_passed_on_loading(sd3, tmp_path, modules):
    sd3[1].save_pretrained(tmp_path)
    custom = {"custom_pipeline": str(FOLDER / "guided_stable_diffusion_3.py"), "trust_remote_code": True}
    for cls, options in ((DiffusionPipeline, custom), (guided_class("sd3"), {})):
        pipe = cls.from_pretrained(tmp_path, guider=ClassifierFreeGuidance(3.0), **options)
        assert type(pipe.guider) is ClassifierFreeGuidance  # not the saved one
    with pytest.raises(
        ValueError, match="apg is of type: <class 'str'>, but should be .*BaseGuidance"
    ):  # Diffusers' own
        DiffusionPipeline.from_pretrained(tmp_path, guider="apg", **custom)


def test_a_guider_that_is_a_function_of_sigma_cannot_be_saved(sd3, tmp_path):
    stock, pipe = sd3
    pipe.guider = apg(lambda sigma: 1.0 + sigma)
    with pytest.raises(ValueError, match="`guidance_scale` is a function and can't be saved"):
        pipe.save_pretrained(tmp_path)


def test_from_pipe_converts_nothing_unless_asked():
    stock = guided_pipeline("sd3")
    stock.transformer.to(torch.bfloat16)
    pipe = guided("sd3", stock)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert guided_class("sd3").from_pipe(stock, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_arguments_by_position(sd3):
    stock, pipe = sd3
    image = {"num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 16}
    by_position, by_name = (
        pipe(*args, generator=torch.Generator().manual_seed(0), **image, **kwargs)[0]
        for args, kwargs in ((("a cat",), {}), ((), {"prompt": "a cat"}))
    )
    assert torch.equal(by_position, by_name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        pipe("a cat", guidance=3.0)


def test_a_call_has_gradients_where_a_stock_one_has(sd3):
    stock, pipe = sd3
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, **GUIDED["sd3"].call([0]), "num_inference_steps": 2, "output_type": "latent"}
    assert not pipe(**call)[0].requires_grad
    differentiable = inspect.unwrap(type(pipe).__call__)
    result = differentiable(pipe, **{**call, "latents": noise.requires_grad_()})[0]
    (gradient,) = torch.autograd.grad(result.sum(), noise)
    assert torch.isfinite(gradient).all() and gradient.any()


def test_several_prompts_and_pictures(sd3):
    """Where the negative prompt is added for the user there is one for each prompt."""
    _, pipe = sd3
    call = {key: value for key, value in GUIDED["sd3"].call([0, 1]).items() if key != "guidance_scale"}
    assert pipe(**call, num_inference_steps=1, num_images_per_prompt=2, output_type="latent")[0].shape[0] == 4


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
@pytest.mark.parametrize("prompt", ["text", "texts", "embeddings"])
def test_a_blank_negative_prompt_where_there_is_none(name, prompt):
    stock = guided_pipeline(name)
    pipe = guided(name, stock, guider=ClassifierFreeGuidance(4.0))
    count = 1 if prompt == "text" else 2
    call = {"prompt": "a red cat" if count == 1 else ["a red cat", "two dog"], "max_sequence_length": 16}
    run = {"num_inference_steps": 2, "output_type": "latent"}
    negative = {"true_cfg_scale": 4.0, "negative_prompt": " " if count == 1 else [" "] * 2}

    def generator():
        return torch.Generator().manual_seed(0)

    own = stock(**call, **negative, **run, generator=generator())[0]
    if prompt == "embeddings":
        made = stock.encode_prompt(**call, **({"prompt_2": None} if name == "flux" else {}))
        names = ["prompt_embeds", "pooled_prompt_embeds"] if name == "flux" else ["prompt_embeds", "prompt_embeds_mask"]
        call = {"max_sequence_length": 16, **dict(zip(names, made, strict=False))}
    guided_result = pipe(**call, **run, generator=generator())[0]
    torch.testing.assert_close(guided_result, own, rtol=0, atol=1e-5 * own.abs().max().item())


def test_the_second_stage_of_wan_has_its_own_scale():
    tiny = guided_pipeline("wan")
    second = guided_pipeline("wan").transformer
    stock = diffusers.WanPipeline(**{**tiny.components, "transformer_2": second, "boundary_ratio": 0.8})
    stock.set_progress_bar_config(disable=True)
    pipe = guided("wan", stock, guider=ClassifierFreeGuidance(5.0))
    both = {"guidance_scale": 5.0, "guidance_scale_2": 2.0}
    own = run(stock, "wan", **both)
    close = {"rtol": 0.0, "atol": 1e-5 * own.abs().max().item()}
    torch.testing.assert_close(run(pipe, "wan", **both), own, **close)
    torch.testing.assert_close(run(pipe, "wan", guidance_scale_2=2.0), own, **close)
    assert (run(pipe, "wan", guidance_scale=5.0) - own).abs().max() > 1e-3 * own.abs().max()
    with pytest.raises(ValueError, match="`guidance_scale_2` needs a guider of trimtab.guidance"):
        run(pipe, "wan", guider=theirs(5.0), guidance_scale_2=2.0)


def theirs(value):
    return diffusers.guiders.ClassifierFreeGuidance(guidance_scale=value)


def test_a_guider_of_diffusers(sd3):
    stock, pipe = sd3
    own = run(stock, "sd3", guidance_scale=5.0)
    for call in ({"guider": theirs(5.0)}, {"guider": theirs(3.0), "guidance_scale": 5.0}):
        assert (run(pipe, "sd3", **call) - own).abs().max() <= 1e-5 * own.abs().max()


def test_the_scale_of_a_wrapped_rule(sd3):
    _, pipe = sd3
    wrapped, inside = (GuidanceRescale(guider=apg(w, eta=0.3), guidance_rescale=0.4) for w in (9.0, 5.0))
    assert torch.equal(run(pipe, "sd3", guider=wrapped, guidance_scale=5.0), run(pipe, "sd3", guider=inside))
    assert wrapped.guider.guidance_scale == 9.0


def test_a_copy_at_another_scale_keeps_the_rest(sd3):
    weak = sd3[0].transformer
    assert at_scale(AutoGuidance(2.0, weak_denoiser=weak), 3.0).weak_denoiser is weak
    assert at_scale(AutoGuidance(2.0, start=0.2), 3.0).config.start == 0.2
    assert at_scale(FrequencyDecoupledGuidance(10.0), 4.0).guidance_scales == [4.0, 2.0]


class Bare(Guidance):
    """A rule of somebody's own, without a config."""


@pytest.mark.parametrize("guider", [FrequencyDecoupledGuidance(guidance_scales=[10.0, 5.0]), Bare(5.0)])
def test_a_guider_without_one_scale(sd3, guider):
    with pytest.raises(ValueError, match=f"`guidance_scale` can't set the scale of a {type(guider).__name__}"):
        run(sd3[1], "sd3", guider=guider, guidance_scale=7.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "7", True, [7.0]])
def test_a_scale_that_is_no_number(sd3, value):
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number or None"):
        run(sd3[1], "sd3", guidance_scale=value)


@pytest.mark.parametrize(
    ("guider", "got"), [("apg", "a str"), (AdaptiveProjectedGuidance, "the class AdaptiveProjectedGuidance")]
)
def test_a_guider_of_the_wrong_type(sd3, guider, got):
    stock, pipe = sd3
    with pytest.raises(TypeError, match=f"`guider` must be a guider .*, got {got}"):
        run(pipe, "sd3", guider=guider)
    with pytest.raises(TypeError, match=f"`guider` must be a guider .*, got {got}"):
        run(pipe, "sd3", guider=guider, guidance_scale=1.0)
    with pytest.raises(TypeError, match=f"`guider` must be a guider .*, got {got}"):
        type(pipe).from_pipe(stock, guider=guider)
    with pytest.raises(TypeError, match=f"`guider` must be a guider .*, got {got}"):
        type(pipe)(**stock.components, guider=guider)


def test_a_guider_that_was_taken_away_is_the_preset_again(sd3):
    _, pipe = sd3
    result = run(pipe, "sd3")
    pipe.guider = None
    assert torch.equal(run(pipe, "sd3"), result)


def test_a_pipeline_without_guidance():
    with pytest.raises(NotImplementedError, match="GuidedFlux2Pipeline can't be guided: .*distilled"):
        type("GuidedFlux2Pipeline", (GuidedPipelineMixin, diffusers.Flux2Pipeline), {})
    with pytest.raises(NotImplementedError, match="its stock class DanceDiffusionPipeline: is no stock pipeline"):
        type("Guided", (GuidedPipelineMixin, diffusers.DanceDiffusionPipeline), {})


def test_a_subclass_keeps_what_it_changes(sd3):
    stock, _ = sd3

    class Mine(guided_class("sd3")):
        @classmethod
        def default_guider(cls):
            return ClassifierFreeGuidance(5.0)

        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    pipe = Mine.from_pipe(stock)
    own = run(stock, "sd3", guidance_scale=5.0)
    assert (run(pipe, "sd3") - own).abs().max() <= 1e-5 * own.abs().max()


def test_a_model_in_use_says_so(sd3):
    stock, pipe = sd3
    with attach(stock, ClassifierFreeGuidance(5.0)), pytest.raises(ValueError, match="attached already"):
        run(pipe, "sd3")
    run(pipe, "sd3")
