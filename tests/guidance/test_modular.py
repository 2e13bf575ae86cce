"""Guiders in modular pipelines: the real block classes with tiny random weights, one row for each family."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState

from tests.more_tiny_pipelines import GUIDED, guided_pipeline, wan
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CFGPlusPlusGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    GuidanceRescale,
    IntervalGuidance,
    NoisyLatentsStep,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    attach,
    with_noisy_latents,
)
from trimtab.guidance.attach import _family_of
from trimtab.guidance.interception import redirect
from trimtab.pipelines.latents import _denormalized, from_tokens

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

STEPS = 2
W = 5.0
ALWAYS = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}


@dataclass(frozen=True)
class Modular:
    """A modular pipeline beside the classic one that it gets its components from.

    Attributes:
        blocks: name of the blocks' class in Diffusers.
        call: further arguments of its call.
        as_modular: classic latents in the shape in which the blocks return theirs.
        as_classic: the other way, where only that way is a function.
    """

    blocks: str
    call: dict[str, Any] = field(default_factory=dict)
    as_modular: Callable[[torch.Tensor], torch.Tensor] = lambda z: z
    as_classic: Callable[[Any, torch.Tensor], torch.Tensor] = lambda classic, z: z


MODULAR = {
    "sd3": Modular("StableDiffusion3AutoBlocks", {"negative_prompt": [""]}),
    "sdxl": Modular("StableDiffusionXLAutoBlocks"),
    "qwen-image": Modular(
        "QwenImageAutoBlocks", {"height": 16, "width": 16}, as_modular=lambda z: from_tokens(z, 2, 8, 8)
    ),
    "wan": Modular("WanBlocks"),
    "flux-2-klein": Modular(
        "Flux2KleinBaseAutoBlocks", as_classic=lambda pipe, z: _denormalized(pipe.vae, _family_of(pipe), z)
    ),
    "z-image": Modular("ZImageAutoBlocks"),
    "ltx": Modular("LTXAutoBlocks", as_modular=lambda z: from_tokens(z, 1, 8, 8)),
}


def modular_pipeline(name, classic, blocks=None):
    """The classic pipeline's components in modular blocks, without decoding; prompts as the classic call has them."""
    blocks = copy.deepcopy(blocks or getattr(diffusers, MODULAR[name].blocks)())
    blocks.sub_blocks.pop("decode")
    if "prompt" not in GUIDED[name].call([0]):
        blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    parts = {part: value for part, value in classic.components.items() if value is not None}
    pipe.update_components(**{part: value for part, value in parts.items() if part in pipe.component_names})
    pipe.vae = classic.vae  # some read its scale also where no block has it
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(W))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, name, *, seed=0, steps=STEPS, **extra):
    call = GUIDED[name].call([0])
    call.pop(GUIDED[name].argument)
    call = {**call, **MODULAR[name].call, "num_inference_steps": steps, **extra}
    return pipe(**call, generator=torch.Generator().manual_seed(seed), output="latents")


def run_classic(pipe, name, *, seed=0, steps=STEPS, **extra):
    call = {**GUIDED[name].call([0], W + _family_of(pipe).guidance.scale_offset), **extra}
    generator = torch.Generator().manual_seed(seed)
    return MODULAR[name].as_modular(
        pipe(**call, num_inference_steps=steps, output_type="latent", generator=generator)[0]
    )


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=MODULAR, scope="module")
def case(request):
    """A family's name, its classic and modular pipelines, and the latter's own result with guidance."""
    classic = guided_pipeline(request.param)
    pipe = modular_pipeline(request.param, classic)
    return request.param, classic, pipe, run(pipe, request.param)


def trace(pipe):
    """Everything attach() could leave behind."""
    parts = {part: getattr(pipe, part, None) for part in pipe.component_names}
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), set(vars(module)))
        for part in parts.values()
        if isinstance(part, torch.nn.Module)
        for module in part.modules()
    ]
    attributes = {name: set(vars(part)) for name, part in parts.items() if part is not None}
    return (
        id(pipe._blocks),
        repr(pipe._blocks),
        set(vars(pipe)),
        {k: id(v) for k, v in parts.items()},
        hooks,
        attributes,
    )


# ---- every family ------------------------------------------------------------------------------------------


def test_rule_is_cfg(case):
    """The identity, as a component and through attach(), against Diffusers' own guider and the classic pipeline."""
    name, classic, pipe, own = case
    assert distance(MODULAR[name].as_classic(classic, own), run_classic(classic, name)) <= 1e-5
    theirs = pipe.guider
    pipe.update_components(guider=ClassifierFreeGuidance(W))
    assert distance(run(pipe, name), own) <= 1e-5
    pipe.update_components(guider=theirs)
    plain = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}
    with attach(pipe, AdaptiveProjectedGuidance(W, **plain)):
        assert distance(run(pipe, name), own) <= 1e-5
    with attach(pipe, ClassifierFreeGuidance(1.0)):
        assert distance(run(pipe, name), own) > 1e-4


def test_projected_guidance_as_in_the_classic_pipeline(case):
    """In x0 space, with momentum and threshold; removal leaves no trace, nor does a run in the next."""
    name, classic, pipe, own = case
    guider = AdaptiveProjectedGuidance(9.0, adaptive_projected_guidance_rescale=1.0)
    with attach(classic, guider):
        expected = run_classic(classic, name)
    before = trace(pipe)
    handle = attach(pipe, guider)
    assert handle.attached and pipe.guider is handle.guider
    guided = run(pipe, name)
    assert distance(MODULAR[name].as_classic(classic, guided), expected) <= 2e-5
    assert distance(guided, own) > 1e-5
    assert torch.equal(run(pipe, name), guided)
    handle.remove()
    handle.remove()
    assert not handle.attached
    assert trace(pipe) == before
    assert torch.equal(run(pipe, name), own)


def test_skipped_layers_as_in_the_classic_pipeline(case):
    name, classic, pipe, own = case
    with attach(classic, SkipLayerGuidance(W, **ALWAYS)):
        expected = run_classic(classic, name)
    with attach(pipe, SkipLayerGuidance(W, **ALWAYS)):
        guided = run(pipe, name)
    assert distance(MODULAR[name].as_classic(classic, guided), expected) <= 2e-5
    assert distance(guided, own) > 1e-5


# ---- how it works ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3():
    return guided_pipeline("sd3")


def test_guider_is_told_what_the_scheduler_knows(sd3):
    """The latents that the scheduler's step gets next, its sigmas, and the steps, seen from inside the rule."""
    seen, steps = [], []

    class Recorder(ClassifierFreeGuidance):
        def combine(self, pred_cond, pred_uncond):
            seen.append((self._sample, self._prediction.level, self._next_prediction.level, self._step))
            return super().combine(pred_cond, pred_uncond)

    pipe = modular_pipeline("sd3", sd3)
    original = pipe.scheduler.step

    def step(noise_pred, t, latents, **kwargs):
        steps.append(latents)
        return original(noise_pred, t, latents, **kwargs)

    pipe.scheduler.step = step
    try:
        with attach(pipe, Recorder(W)):
            run(pipe, "sd3", steps=4)
    finally:
        del pipe.scheduler.step
    sigmas = pipe.scheduler.sigmas.tolist()
    assert all(torch.equal(told, given) for (told, *_), given in zip(seen, steps, strict=True))
    assert [level for _, level, *_ in seen] == pytest.approx(sigmas[:-1])
    assert [level for *_, level, _ in seen] == pytest.approx(sigmas[1:])
    assert [step for *_, step in seen] == [0, 1, 2, 3]


def test_blocks_that_have_the_step(sd3):
    """Made with it, a pipeline takes every rule by update_components, and the blocks' class is untouched."""
    stock = diffusers.StableDiffusion3AutoBlocks()
    before = repr(stock)
    pipe = modular_pipeline("sd3", sd3, with_noisy_latents(stock))
    assert repr(stock) == before == repr(diffusers.StableDiffusion3AutoBlocks())
    guider = AdaptiveProjectedGuidance(9.0)
    pipe.update_components(guider=guider)
    guided = run(pipe, "sd3")
    other = modular_pipeline("sd3", sd3)
    for same in (pipe, other):
        with attach(same, AdaptiveProjectedGuidance(9.0)):
            assert torch.equal(run(same, "sd3"), guided)
    other.update_components(guider=guider)
    with pytest.raises(RuntimeError, match="attach"):  # x0 space without the latents
        run(other, "sd3")
    other.update_components(guider=IntervalGuidance(W, sigma_range=(0.1, 0.5)))
    with pytest.raises(RuntimeError, match="noise level"):
        run(other, "sd3")
    with pytest.raises(NotImplementedError, match="no denoising loop"):
        with_noisy_latents(diffusers.FluxAutoBlocks())


def test_other_guiders_are_left_alone(sd3):
    pipe = modular_pipeline("sd3", sd3)
    own = run(pipe, "sd3")
    with attach(pipe, diffusers.ClassifierFreeGuidance(W)):
        assert torch.equal(run(pipe, "sd3"), own)
    with pytest.raises(ValueError, match="changes the denoiser"):
        attach(pipe, diffusers.SkipLayerGuidance(skip_layer_guidance_layers=[0]))


def test_a_run_that_ends_unguided_leaves_the_next_its_negative_prompt():
    """SDXL asks the guider before a run whether to encode one; Diffusers' own guider answers for the last step."""
    pipe = modular_pipeline("sdxl", guided_pipeline("sdxl"))
    pipe.update_components(guider=ClassifierFreeGuidance(W, stop=0.5))
    first = run(pipe, "sdxl")
    assert torch.equal(run(pipe, "sdxl"), first)


def test_no_negative_prompt_is_told(sd3):
    """SD3's blocks encode none by themselves, and would guide nothing without a word."""
    pipe = modular_pipeline("sd3", sd3)
    with attach(pipe, ClassifierFreeGuidance(W)), pytest.raises(ValueError, match="negative_prompt=''"):
        run(pipe, "sd3", negative_prompt=None)
    with attach(pipe, ClassifierFreeGuidance(1.0)):
        run(pipe, "sd3", negative_prompt=None)


@pytest.mark.parametrize("scheduler", [diffusers.HeunDiscreteScheduler, diffusers.DDIMScheduler])
def test_schedulers(scheduler):
    """Two evaluations a step, and one that keeps no index of its own: as in the classic pipeline."""
    classic = guided_pipeline("sdxl")
    classic.scheduler = scheduler.from_config(classic.scheduler.config)
    pipe = modular_pipeline("sdxl", classic)
    guider = AdaptiveProjectedGuidance(9.0, adaptive_projected_guidance_rescale=1.0)
    with attach(classic, guider):
        expected = run_classic(classic, "sdxl")
    with attach(pipe, guider):
        guided = run(pipe, "sdxl")
        assert (guider._step, guider._num_inference_steps) == (STEPS - 1, STEPS)
    assert distance(guided, expected) <= 2e-5


def test_image_to_image(sd3):
    """A run that begins in the middle of the timesteps."""
    pipe = modular_pipeline("sd3", sd3)
    pipe.update_components(image_processor=diffusers.image_processor.VaeImageProcessor(vae_scale_factor=2))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    levels = []

    class Recorder(AdaptiveProjectedGuidance):
        def combine(self, pred_cond, pred_uncond):
            levels.append((self.sigma, self._step, self._num_inference_steps))
            return super().combine(pred_cond, pred_uncond)

    with attach(pipe, Recorder(W)):
        run(pipe, "sd3", image=image, strength=0.5, steps=4, height=16, width=16)
    assert [level for level, *_ in levels] == pytest.approx(pipe.scheduler.sigmas[2:-1].tolist())
    assert [step for _, *step in levels] == [[0, 2], [1, 2]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: CFGPlusPlusGuidance(0.7),
        lambda: ClassifierFreeZeroStarGuidance(W),
        lambda: GuidanceRescale(guider=AdaptiveProjectedGuidance(W)),
        lambda: IntervalGuidance(guider=PerturbedAttentionGuidance(W), sigma_range=(0.3, 0.95)),
        lambda: SmoothedEnergyGuidance(W),
        lambda: AutoGuidance(2.0),
        lambda: AdaptiveProjectedGuidance(lambda sigma: 9.0 if sigma > 0.7 else 1.0),
    ],
)
def test_rules_as_in_the_classic_pipeline(sd3, make):
    with attach(sd3, make()):
        expected = run_classic(sd3, "sd3")
    pipe = modular_pipeline("sd3", sd3)
    own = run(pipe, "sd3")
    with attach(pipe, make()):
        guided = run(pipe, "sd3")
    assert distance(guided, expected) <= 2e-5
    assert distance(guided, own) > 1e-4


def test_weak_denoiser(sd3):
    """Autoguidance by another denoiser, on one step of Euler, which is affine in the output."""
    w, pipe, weak = 3.0, modular_pipeline("sd3", sd3), guided_pipeline("sd3").transformer
    for parameter in weak.parameters():
        parameter.requires_grad_(False).mul_(0.9)
    ends = []
    for denoiser in (weak, sd3.transformer):
        pipe.update_components(transformer=denoiser, guider=ClassifierFreeGuidance(1.0))
        ends.append(run(pipe, "sd3", steps=1))
    pipe.update_components(guider=AutoGuidance(w, weak_denoiser=weak))
    before = trace(pipe)
    k, c = ends
    assert distance(run(pipe, "sd3", steps=1), k + w * (c - k)) <= 1e-4
    assert distance(k, c) > 1e-2
    assert trace(pipe) == before


@pytest.mark.parametrize("how", ["plain", "wrapped", "in place"])
def test_redirected_calls(how):
    module, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    if how == "in place":
        module.compile(backend="eager")
    called = torch.compile(module, backend="eager") if how == "wrapped" else module
    own, attributes = called(x), set(vars(called))
    undo = redirect(called, lambda value: 2 * value)
    assert torch.equal(called(x), 2 * x)
    undo()
    assert torch.equal(called(x), own) and set(vars(called)) == attributes
    torch.compiler.reset()


def test_two_denoisers_and_two_guiders():
    """Wan 2.2: one guider in the place of both, as in the classic pipeline."""
    classic = guided_pipeline("wan")
    classic = diffusers.WanPipeline(**{**classic.components, "transformer_2": wan().transformer.eval()})
    classic.register_to_config(boundary_ratio=0.8)
    classic.set_progress_bar_config(disable=True)
    with attach(classic, AdaptiveProjectedGuidance(9.0)):
        expected = run_classic(classic, "wan", steps=4)
    pipe = modular_pipeline("wan", classic, diffusers.Wan22Blocks())
    pipe.update_components(boundary_ratio=0.8)
    before = trace(pipe)
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        assert pipe.guider is pipe.guider_2
        guided = run(pipe, "wan", steps=4)
        levels = pipe.scheduler.timesteps / 1000
        assert (levels >= 0.8).any() and (levels < 0.8).any()
    assert distance(guided, expected) <= 2e-5
    assert trace(pipe) == before


def test_reference_tokens_take_no_part():
    """Qwen-Image's editing blocks drop the reference picture's tokens after guidance: norms must not see them."""
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(1, 6, 4, generator=generator) for _ in range(2))
    x = torch.randn(1, 4, 4, generator=generator)
    results = []
    for rows in (6, 4):
        guider = AdaptiveProjectedGuidance(W, space="raw", adaptive_projected_guidance_rescale=1.0)
        guider.expect(0, 1, True, x, None, None)
        guider.set_state(0, 1, None)
        data = [
            BlockState(__guidance_identifier__=name, noise_pred=prediction[:, :rows])
            for name, prediction in zip(guider.wanted, (c, u), strict=True)
        ]
        results.append(guider(data).pred[:, :4])
    assert torch.equal(*results)


# ---- what can't be done ------------------------------------------------------------------------------------


def test_pipelines_without_a_guider():
    guider = ClassifierFreeGuidance(W)
    with pytest.raises(NotImplementedError, match="FluxModularPipeline can't be guided: .*FluxPipeline.*true_cfg"):
        attach(diffusers.FluxAutoBlocks().init_pipeline(), guider)
    with pytest.raises(NotImplementedError, match="Flux2ModularPipeline can't be guided: .*no guider"):
        attach(diffusers.Flux2AutoBlocks().init_pipeline(), guider)
    with pytest.raises(NotImplementedError, match="no guider and make no unconditional prediction$"):
        attach(diffusers.Flux2KleinAutoBlocks().init_pipeline(), guider)
    with pytest.raises(NotImplementedError, match="takes .*ZImageModularPipeline"):
        attach(diffusers.HunyuanVideo15AutoBlocks().init_pipeline(), guider)


def test_refusals(sd3):
    pipe, other = modular_pipeline("sd3", sd3), modular_pipeline("sd3", sd3)
    before = trace(pipe)
    with pytest.raises(TypeError, match="BaseGuidance"):
        attach(pipe, 7.5)
    with pytest.raises(NotImplementedError, match="`renormalize`"):
        attach(pipe, ClassifierFreeGuidance(W), renormalize=True)
    with pytest.raises(ValueError, match="layers have 99"):
        attach(pipe, SkipLayerGuidance(skip_layer_guidance_layers=[99]))
    guider = ClassifierFreeGuidance(W)
    with attach(pipe, guider):
        with pytest.raises(ValueError, match="SD3Transformer2DModel.*attached already"):
            attach(other, ClassifierFreeGuidance(W))
        with pytest.raises(ValueError, match="attached already"):
            attach(sd3, ClassifierFreeGuidance(W))
    assert trace(pipe) == before


def test_what_renormalization_undoes():
    """Qwen-Image's block gives the result the conditional prediction's norm."""
    pipe = modular_pipeline("qwen-image", guided_pipeline("qwen-image"))
    with pytest.raises(NotImplementedError, match="undoes zero_init_steps"):
        attach(pipe, ClassifierFreeZeroStarGuidance(W))
    with pytest.raises(NotImplementedError, match="undoes CFGPlusPlusGuidance"):
        attach(pipe, GuidanceRescale(guider=CFGPlusPlusGuidance(0.5)))
    with attach(pipe, ClassifierFreeZeroStarGuidance(W, zero_init_steps=0)):
        assert torch.isfinite(run(pipe, "qwen-image")).all()


def test_image_to_video():
    """LTX: the given frame's tokens are without noise, at another time than the rest."""
    state = BlockState(latents=torch.zeros(1, 2, 2), timesteps=torch.ones(1), conditioning_mask=torch.ones(1, 2))
    pipe = modular_pipeline("ltx", guided_pipeline("ltx"))
    pipe.update_components(guider=AdaptiveProjectedGuidance(W))
    with pytest.raises(NotImplementedError, match="raw space"):
        NoisyLatentsStep()(pipe, state, i=0, t=state.timesteps[0])


def test_only_the_callers_objects_are_replaced(sd3):
    """What somebody put in the guider's place meanwhile stays."""
    pipe = modular_pipeline("sd3", sd3)
    theirs = ClassifierFreeGuidance(2.0)
    with attach(pipe, ClassifierFreeGuidance(W)):
        pipe.update_components(guider=theirs)
    assert pipe.guider is theirs
