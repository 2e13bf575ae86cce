"""attach() together with what else people do to pipelines."""

import threading

import diffusers
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

from tests.more_tiny_pipelines import GUIDED, guided_pipeline, wan
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CFGPlusPlusGuidance,
    ClassifierFreeGuidance,
    FrequencyDecoupledGuidance,
    IntervalGuidance,
    PerturbedAttentionGuidance,
    attach,
)
from trimtab.pipelines import GenerationMap

pytestmark = [
    pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def run(pipe, name, scale=5.0, *, seed=0, steps=3, **extra):
    call = {**GUIDED[name].call([0], scale), **extra}
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, output_type="latent", generator=generator, **call)[0]


def guided(pipe, name, guider=None, **extra):
    with attach(pipe, guider or AdaptiveProjectedGuidance(9.0)):
        return run(pipe, name, **extra)


# ---- schedulers --------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "dpm++-single": diffusers.DPMSolverSinglestepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, prediction_type):
    """The identity, through x0 space, under every scheduler; and the steps that the guider is told."""
    pipe = guided_pipeline("sd15")
    pipe.scheduler = SCHEDULERS[name].from_config(
        pipe.scheduler.config, prediction_type=prediction_type, skip_prk_steps=True
    )
    own = run(pipe, "sd15")
    plain = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0, "eta": 1.0}
    same = guided(pipe, "sd15", AdaptiveProjectedGuidance(5.0, **plain), scale=2.0)
    assert (same - own).abs().max() <= 2e-5 * own.abs().max()
    guider = AdaptiveProjectedGuidance(5.0)
    assert torch.isfinite(guided(pipe, "sd15", guider)).all()
    evaluations = len(pipe.scheduler.timesteps)
    order = pipe.scheduler.order
    assert guider._step == guider._num_inference_steps - 1 == -(-evaluations // order) - 1


def test_two_evaluations_make_a_step():
    """Heun: the momentum moves once a step, so the first evaluation of step 1 sees the first of step 0."""
    pipe = guided_pipeline("sd15")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    kept = []

    class Watching(AdaptiveProjectedGuidance):
        def _with_momentum(self, difference):
            d = super()._with_momentum(difference)
            kept.append((self._step, difference, d))
            return d

    guided(pipe, "sd15", Watching(9.0), steps=3)
    assert [step for step, *_ in kept] == [0, 0, 1, 1, 2]
    first = kept[0][1]
    for _, difference, d in kept[2:4]:
        assert torch.allclose(d, difference - 0.5 * first, atol=1e-6)


def test_scheduler_exchanged_while_attached():
    pipe = guided_pipeline("sd15")
    first = pipe.scheduler
    second = diffusers.EulerDiscreteScheduler.from_config(first.config)
    names = [set(vars(s)) for s in (first, second)]
    with attach(pipe, ClassifierFreeGuidance(5.0)):
        results = [run(pipe, "sd15", 2.0)]
        pipe.scheduler = second
        results.append(run(pipe, "sd15", 2.0))
        pipe.scheduler = first
        results.append(run(pipe, "sd15", 2.0))
    for scheduler, result in ((first, results[0]), (second, results[1]), (first, results[2])):
        pipe.scheduler = scheduler
        assert torch.allclose(run(pipe, "sd15", 5.0), result, atol=1e-5)
    assert not any({"step", "set_timesteps"} & set(vars(s)) for s in (first, second))
    assert names[0] <= set(vars(first)) and names[1] <= set(vars(second))


def test_scheduler_without_a_known_noise_level():
    pipe = guided_pipeline("sd15")
    pipe.scheduler = diffusers.IPNDMScheduler()
    pipe.scheduler.scale_model_input = lambda sample, *_: sample
    with pytest.raises(NotImplementedError, match="IPNDM"):
        guided(pipe, "sd15")
    raw = guided(pipe, "sd15", AdaptiveProjectedGuidance(9.0, space="raw"))
    assert torch.isfinite(raw).all()


def test_cfg_plus_plus_in_a_pipeline():
    """lambda = 1 is not plain conditional sampling: the noise put back is the unconditional one."""
    for name in ("sd15", "sd3"):
        pipe = guided_pipeline(name)
        result = guided(pipe, name, CFGPlusPlusGuidance(0.7))
        assert torch.isfinite(result).all()
        plain = guided(pipe, name, ClassifierFreeGuidance(0.7))
        assert (result - plain).abs().max() > 1e-5 * plain.abs().max()


# ---- pipelines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_denoiser(name, how):
    pipe = guided_pipeline(name)
    attribute = "unet" if name == "sd15" else "transformer"
    expected = guided(pipe, name)
    half = guided(pipe, name, ClassifierFreeGuidance(5.0, start=0.5))
    denoiser = getattr(pipe, attribute)
    if how == "wrapped":
        setattr(pipe, attribute, torch.compile(denoiser, backend="eager"))
    else:
        denoiser.compile(backend="eager")
        compiled = denoiser._compiled_call_impl
    assert torch.allclose(guided(pipe, name), expected, atol=1e-4)
    assert torch.allclose(guided(pipe, name, ClassifierFreeGuidance(5.0, start=0.5)), half, atol=1e-4)
    if how == "in place":
        assert denoiser._compiled_call_impl is compiled
    with pytest.raises(NotImplementedError, match="compiled"):
        attach(pipe, PerturbedAttentionGuidance(4.0))
    torch.compiler.reset()


def test_denoiser_exchanged_or_compiled_while_attached():
    """Guidance would be lost without a word: the next run says so."""
    pipe, other = guided_pipeline("sd3"), guided_pipeline("sd3")
    own = pipe.transformer
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        pipe.transformer = other.transformer
        with pytest.raises(RuntimeError, match="`transformer` was exchanged"):
            run(pipe, "sd3")
        pipe.transformer = own
        own.compile(backend="eager")
        with pytest.raises(RuntimeError, match="compiled"):
            run(pipe, "sd3")
        own._compiled_call_impl = None
        run(pipe, "sd3")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_offloading_hooks(name):
    """What enable_model_cpu_offload and sequential offloading do: accelerate replaces forward."""
    pipe = guided_pipeline(name)
    expected = guided(pipe, name, ClassifierFreeGuidance(5.0, start=0.5))
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hooked = pipe.transformer.forward
    assert torch.equal(guided(pipe, name, ClassifierFreeGuidance(5.0, start=0.5)), expected)
    assert pipe.transformer.forward is hooked
    with attach(pipe, ClassifierFreeGuidance(5.0, start=0.5)):  # and put on, or taken off, while attached
        remove_hook_from_module(pipe.transformer)
        assert torch.equal(run(pipe, name), expected)
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_model_cpu_offload(name):
    """Components come to the device of execution one by one; a CPU may be that device."""
    pipe = guided_pipeline(name)
    expected = guided(pipe, name)
    pipe.enable_model_cpu_offload(device="cpu")
    denoiser = pipe.unet if name == "sd15" else pipe.transformer
    hook, uses = type(denoiser._hf_hook), []
    denoiser._hf_hook.pre_forward = lambda module, *args, **kwargs: uses.append(module) or (args, kwargs)
    assert torch.equal(guided(pipe, name), expected)
    assert len(uses) == 3 and all(module is denoiser for module in uses)
    assert type(denoiser._hf_hook) is hook  # a new one: the pipeline puts them on anew after each call
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):  # and put on anew while attached
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(run(pipe, name), expected)
    pipe.remove_all_hooks()
    assert torch.equal(guided(pipe, name), expected) and not denoiser._forward_hooks


def test_lora_made_in_place():
    pipe = guided_pipeline("sd3")
    base = guided(pipe, "sd3")
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name="a")
        changed = run(pipe, "sd3")
        pipe.transformer.disable_adapters()
        assert torch.allclose(run(pipe, "sd3"), base, atol=1e-5)
    assert not torch.allclose(changed, base, atol=1e-4)


def test_lora_loaded_from_a_file(tmp_path):
    """Loaded before or while a guider is attached, the same; unloaded, as before."""
    pipe, donor = guided_pipeline("sd3"), guided_pipeline("sd3").transformer
    base = guided(pipe, "sd3")
    donor.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = peft.get_peft_model_state_dict(donor)
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    before = guided(pipe, "sd3")
    assert not torch.allclose(before, base, atol=1e-3)
    pipe.unload_lora_weights()
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        pipe.load_lora_weights(tmp_path, adapter_name="a")
        assert torch.allclose(run(pipe, "sd3"), before, atol=1e-5)
        pipe.unload_lora_weights()
        assert torch.allclose(run(pipe, "sd3"), base, atol=1e-5)
    assert torch.allclose(guided(pipe, "sd3"), base, atol=1e-5)


def test_callback_sees_and_changes_latents():
    pipe = guided_pipeline("sd3")
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, kwargs["latents"].shape))
        return {"latents": kwargs["latents"] * 0.5}

    changed = guided(pipe, "sd3", callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert not torch.allclose(changed, guided(pipe, "sd3"))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_several_images_and_negative_prompts(name):
    pipe = guided_pipeline(name)
    several = guided(pipe, name, num_images_per_prompt=3)
    assert several.shape[0] == 3 and not torch.equal(several[0], several[1])
    own = run(pipe, name, negative_prompt=["a dog"], num_images_per_prompt=2)
    same = guided(
        pipe, name, ClassifierFreeGuidance(5.0), negative_prompt=["a dog"], num_images_per_prompt=2, scale=2.0
    )
    assert torch.allclose(same, own, atol=1e-5)
    assert not torch.allclose(own[:1], run(pipe, name, negative_prompt=["photo"]), atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "sana", "z-image", "wan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(name, dtype):
    pipe = guided_pipeline(name).to(dtype=dtype)
    call = GUIDED[name].call([0], 5.0)
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    call = {k: [t.to(dtype) for t in v] if name == "z-image" and isinstance(v, list) else v for k, v in call.items()}
    offset = -1.0 if name == "z-image" else 0.0

    def make(scale):
        call[GUIDED[name].argument] = scale + offset
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, num_inference_steps=3, output_type="latent", generator=generator)[0]

    own = make(5.0)
    with attach(pipe, ClassifierFreeGuidance(5.0)):
        assert torch.equal(make(2.0), own)
    with attach(pipe, AdaptiveProjectedGuidance(5.0)):
        result = make(2.0)
    assert result.dtype == own.dtype and torch.isfinite(result).all()


def test_two_threads():
    """Two pipelines with denoisers of their own, attached at once, as if each were alone."""
    names = ("sd3", "sd15")
    pipes = [guided_pipeline(name) for name in names]
    alone = [guided(pipe, name, steps=6) for pipe, name in zip(pipes, names, strict=True)]
    results, start = {}, threading.Barrier(2)

    def work(k):
        with attach(pipes[k], AdaptiveProjectedGuidance(9.0)):
            start.wait()
            results[k] = [run(pipes[k], names[k], steps=6) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        for result in results[k]:
            assert torch.equal(result, alone[k])


def test_gradients_pass_through():
    """Through the rule, its momentum and x0 space; against a finite difference in float64 with DDIM."""
    pipe = guided_pipeline("sd15").to(dtype=torch.float64)
    call = type(pipe).__call__.__wrapped__
    prompt, negative = pipe.encode_prompt("a red cat", "cpu", 1, True)
    settings = {"prompt_embeds": prompt.detach(), "negative_prompt_embeds": negative.detach()}
    settings |= {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with attach(pipe, AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_rescale=1.0)):
        start = x.clone().requires_grad_()
        call(pipe, latents=start, **settings)[0].square().sum().backward()
        with torch.no_grad():
            ends = [call(pipe, latents=x + h * direction, **settings)[0].square().sum() for h in (1e-5, -1e-5)]
    slope = (ends[0] - ends[1]) / 2e-5
    assert (start.grad * direction).sum() == pytest.approx(slope.item(), rel=1e-5)


# ---- families' own ways ------------------------------------------------------------------------------------


def test_pipelines_that_end_guidance_early():
    """Lumina 2's cfg_trunc_ratio and Z-Image's cfg_truncation: those steps are conditional, as the caller asks."""
    pipe = guided_pipeline("lumina-2")
    own = run(pipe, "lumina-2", cfg_trunc_ratio=0.5, steps=4)
    same = guided(pipe, "lumina-2", ClassifierFreeGuidance(5.0), cfg_trunc_ratio=0.5, scale=2.0, steps=4)
    assert torch.allclose(same, own, atol=1e-5)
    pipe = guided_pipeline("z-image")
    own = run(pipe, "z-image", 4.0, cfg_truncation=0.5, steps=4)
    same = guided(pipe, "z-image", ClassifierFreeGuidance(5.0), cfg_truncation=0.5, scale=1.0, steps=4)
    assert torch.allclose(same, own, atol=1e-5)


def test_renormalization_can_be_turned_off():
    pipe = guided_pipeline("lumina-2")
    own = run(pipe, "lumina-2", cfg_normalization=False)
    with attach(pipe, ClassifierFreeGuidance(5.0), renormalize=False):
        assert torch.allclose(run(pipe, "lumina-2", 2.0), own, atol=1e-5)


TOKENS = {
    "flux": lambda pipe, z: pipe._unpack_latents(z, 16, 16, pipe.vae_scale_factor),
    "qwen-image": lambda pipe, z: pipe._unpack_latents(z, 16, 16, pipe.vae_scale_factor)[:, :, 0],
    "ltx": lambda pipe, z: pipe._unpack_latents(z, 3, 8, 8, 1, 1),
    "flux-2-klein": lambda pipe, z: pipe._unpatchify_latents(z.transpose(1, 2).unflatten(2, (4, 4))),
}


@pytest.mark.parametrize("name", TOKENS)
def test_frequencies_of_tokens(name):
    """They are put in their places, as the pipeline itself does for its autoencoder, and back."""
    seen, kept = [], []

    class Watching(FrequencyDecoupledGuidance):
        def combine(self, pred_cond, pred_uncond):
            seen.append((pred_cond, pred_uncond))
            return super().combine(pred_cond, pred_uncond)

    class Keeping(ClassifierFreeGuidance):
        def combine(self, pred_cond, pred_uncond):
            kept.append((pred_cond, pred_uncond))
            return super().combine(pred_cond, pred_uncond)

    pipe = guided_pipeline(name)
    plain = guided(pipe, name, Keeping(5.0))
    same = guided(pipe, name, Watching(guidance_scales=[5.0, 5.0]))
    assert (same - plain).abs().max() <= 1e-4 * plain.abs().max()
    for tokens, picture in zip(kept[0], seen[0], strict=True):
        expected = TOKENS[name](pipe, tokens)
        picture = picture if expected.ndim == 5 else picture[:, :, 0]
        assert torch.allclose(picture, expected, atol=1e-6)
    assert not torch.allclose(guided(pipe, name, IntervalGuidance(guider=Watching(5.0), start=0.0)), plain, atol=1e-6)


def test_two_denoisers():
    """Wan 2.2: one transformer for high noise, another for low; guidance in both."""
    pipe = guided_pipeline("wan")
    other = wan().transformer.eval()
    both = diffusers.WanPipeline(
        **{**pipe.components, "transformer_2": other, "transformer": pipe.transformer}, boundary_ratio=0.8
    )
    both.set_progress_bar_config(disable=True)
    own = run(both, "wan", steps=4)
    with attach(both, ClassifierFreeGuidance(5.0)):
        assert torch.allclose(run(both, "wan", 2.0, steps=4), own, atol=1e-5)
    assert not torch.allclose(own, run(pipe, "wan", steps=4), atol=1e-3)
    assert not other._forward_hooks and not pipe.transformer._forward_hooks


def test_networks_that_take_the_scale_as_an_input():
    """Latent consistency models: no guidance_scale makes their pipeline predict twice; autoguidance needs no second."""
    pipe = guided_pipeline("sd15")
    pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    for guider in (AdaptiveProjectedGuidance(5.0), diffusers.ClassifierFreeGuidance(5.0)):
        with pytest.raises(NotImplementedError, match=r"`unet` takes the guidance scale as an input .*=8"):
            attach(pipe, guider)
    assert not torch.equal(guided(pipe, "sd15", AutoGuidance(2.0)), guided(pipe, "sd15", AutoGuidance(1.0)))


def test_pipelines_without_guidance():
    class Flux2Pipeline(diffusers.DiffusionPipeline):
        pass

    with pytest.raises(NotImplementedError, match="Flux2Pipeline can't be guided: .*distilled"):
        attach(Flux2Pipeline(), ClassifierFreeGuidance(5.0))
    distilled = guided_pipeline("flux-2-klein")
    distilled.register_to_config(is_distilled=True)
    with attach(distilled, ClassifierFreeGuidance(5.0)), pytest.raises(ValueError, match="unconditional"):
        run(distilled, "flux-2-klein")
    pipe = guided_pipeline("flux")
    with attach(pipe, ClassifierFreeGuidance(5.0)), pytest.raises(ValueError, match="true_cfg_scale > 1"):
        run(pipe, "flux", 1.0)


def test_inside_a_generation_map():
    """Latents as a function, checkpointed gradients included: the same values and slopes with and without."""
    pipe = guided_pipeline("sd3")
    settings = {"guidance_scale": 5.0, "num_inference_steps": 3, "output": "latent", "max_sequence_length": 16}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    with attach(pipe, AdaptiveProjectedGuidance(9.0)):
        stock = pipe("a red cat", latents=noise, max_sequence_length=16, num_inference_steps=3, output_type="latent")
        for checkpointing in (True, False):
            f = GenerationMap(pipe, "a red cat", gradient_checkpointing=checkpointing, **settings)
            z = noise.clone().requires_grad_()
            latents = f(z)
            latents.square().sum().backward()
            results.append((latents.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(results[0][0], stock[0], atol=1e-5)
    plain = GenerationMap(pipe, "a red cat", **settings)(noise)
    assert not torch.allclose(plain, results[0][0], atol=1e-3)
