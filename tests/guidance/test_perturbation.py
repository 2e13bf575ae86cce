"""Weakened predictions against independent computations with the same weights."""

import copy
import dataclasses
import math

import pytest
import torch

from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.guidance import (
    AutoGuidance,
    Guidance,
    IntervalGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    attach,
)
from trimtab.guidance.perturbation import blocks_of, middle_blocks, smoothed_queries
from trimtab.guidance.run import Rows
from trimtab.guidance.weakened import _Weakened

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


def run(pipe, name, scale=5.0, **extra):
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 1, "output_type": "latent", "generator": generator}
    return pipe(**GUIDED[name].call([0], scale), **settings, **extra)[0]


def weak_prediction(pipe, name, guider, monkeypatch):
    """k of the first step, as the guider gets it."""
    kept = []
    forward = _Weakened.forward

    def keep(self, pred_cond, pred_uncond=None, pred_cond_skip=None):
        kept.append((pred_cond, pred_cond_skip))
        return forward(self, pred_cond, pred_uncond, pred_cond_skip)

    monkeypatch.setattr(_Weakened, "forward", keep)
    with attach(pipe, guider):
        run(pipe, name)
    return kept[0]


def cond_of(pipe, name, monkeypatch):
    return weak_prediction(pipe, name, AutoGuidance(1.5), monkeypatch)[0]


def test_skipped_layers_are_a_shorter_network(monkeypatch):
    """SD3 with one block skipped is SD3 without that block."""
    pipe = guided_pipeline("sd3")
    window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    _, weak = weak_prediction(pipe, "sd3", SkipLayerGuidance(5.0, skip_layer_guidance_layers=0, **window), monkeypatch)
    shorter = guided_pipeline("sd3")
    del shorter.transformer.transformer_blocks[0]
    assert torch.allclose(weak, cond_of(shorter, "sd3", monkeypatch), atol=1e-5)


@pytest.mark.parametrize("name", ["cogview-4", "qwen-image", "wan", "ltx", "hunyuan-dit"])
def test_skipped_layers_in_other_families(name, monkeypatch):
    """As many tokens of text as of the picture where that can be: the streams are told apart by their place."""
    case = GUIDED[name]
    if name == "cogview-4":
        longer = {key: torch.cat([value, value], 1) for key, value in case.prompts([0]).items()}
        monkeypatch.setitem(GUIDED, name, dataclasses.replace(case, prompts=lambda rows: longer))
    window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    guider = SkipLayerGuidance(5.0, skip_layer_guidance_layers=0, **window)
    _, weak = weak_prediction(guided_pipeline(name), name, guider, monkeypatch)
    shorter = guided_pipeline(name)
    blocks = blocks_of(shorter.transformer)
    for module in shorter.transformer.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and module[0] is blocks[0]:
            del module[0]
    assert torch.allclose(weak, cond_of(shorter, name, monkeypatch), atol=1e-4)


def test_skipping_is_the_pipelines_own_skipping(monkeypatch):
    """Stable Diffusion 3's own skip_guidance_layers, which computes u + w (c - u) + s (c - k) as well."""
    pipe = guided_pipeline("sd3")
    window = {"skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 1.0}
    theirs = run(pipe, "sd3", skip_guidance_layers=[0], skip_layer_guidance_scale=2.8, **window)
    window["skip_layer_guidance_start"] = 0.0
    guider = SkipLayerGuidance(5.0, skip_layer_guidance_scale=2.8, skip_layer_guidance_layers=[0], **window)
    with attach(pipe, guider):
        ours = run(pipe, "sd3", 2.0)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_pag_of_sdxl_is_attention_without_a_map(monkeypatch):
    """Identity attention: the same network whose self-attention processor returns the values."""
    pipe = guided_pipeline("sdxl")
    cond, weak = weak_prediction(pipe, "sdxl", PerturbedAttentionGuidance(5.0), monkeypatch)

    class Values:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return attn.to_out[0](attn.to_v(hidden_states))

    changed = guided_pipeline("sdxl")
    for block in changed.unet.mid_block.attentions[0].transformer_blocks:
        block.attn1.set_processor(Values())
    assert torch.allclose(weak, cond_of(changed, "sdxl", monkeypatch), atol=1e-5)
    assert not torch.allclose(weak, cond, atol=1e-5)


def test_seg_with_an_infinite_blur_has_one_query(monkeypatch):
    """The mean query: the same network whose queries are replaced by their mean."""
    pipe = guided_pipeline("sdxl")
    _, weak = weak_prediction(pipe, "sdxl", SmoothedEnergyGuidance(5.0), monkeypatch)
    changed = guided_pipeline("sdxl")
    for block in changed.unet.mid_block.attentions[0].transformer_blocks:
        block.attn1.to_q.register_forward_hook(
            lambda _, args, output: output.mean(dim=1, keepdim=True).expand_as(output)
        )
    assert torch.allclose(weak, cond_of(changed, "sdxl", monkeypatch), atol=1e-5)


def test_blur_keeps_constants_and_lowers_variance():
    """Through attention with value = identity: what arrives there is the smoothed query."""
    seen = []

    class Attention(torch.nn.Module):
        def forward(self, query):
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    def attend(query, key, value, **_):
        seen.append(query)
        return value

    torch.manual_seed(0)
    query = torch.randn(2, 1, 64 + 3, 4)  # 8x8 tokens and three more, which stay
    module, rows = Attention(), Rows(start=1, total=2)
    for sigma in (0.5, 3.0, math.inf):
        undo = smoothed_queries(module, rows, sigma)
        plain = module(query)
        undo()
        assert torch.equal(plain[0], module(query)[0]) and not torch.equal(plain[1], module(query)[1])
    from trimtab.guidance.perturbation import _blur

    constant = torch.ones(1, 1, 64, 4)
    assert torch.allclose(_blur(constant, 1.0), constant, atol=1e-6)
    variances = [_blur(query[:, :, :64], sigma).var().item() for sigma in (0.3, 1.0, 3.0)]
    assert variances == sorted(variances, reverse=True)
    assert torch.equal(_blur(query, 1.0)[:, :, 64:], query[:, :, 64:])
    assert torch.allclose(_blur(query, math.inf)[:, :, 0], query[:, :, :64].mean(2), atol=1e-6)


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_blocks_are_found_in_every_denoiser(name):
    pipe = guided_pipeline(name)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    assert blocks_of(denoiser) and middle_blocks(denoiser)
    for guider in (PerturbedAttentionGuidance(4.0), SmoothedEnergyGuidance(4.0)):
        weights = copy.deepcopy(denoiser.state_dict())
        with attach(pipe, guider):
            changed = run(pipe, name)
        assert torch.isfinite(changed).all()
        assert all(torch.equal(value, weights[key]) for key, value in denoiser.state_dict().items())
    with pytest.raises(ValueError, match="has .* blocks"):
        attach(pipe, SkipLayerGuidance(4.0, skip_layer_guidance_layers=[99]))
    attach(pipe, PerturbedAttentionGuidance(4.0)).remove()  # nothing was left by the refusal


def test_autoguidance_by_another_network():
    """k + w (c - k) with a network of other weights, by hand from two plain runs."""
    pipe, weak = guided_pipeline("sd3"), guided_pipeline("sd3")
    with torch.no_grad():
        for parameter in weak.transformer.parameters():
            parameter.mul_(0.9)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    c, k = (run(p, "sd3", 1.0, latents=start) for p in (pipe, weak))  # one step of Euler is affine in the output
    with attach(pipe, AutoGuidance(3.0, weak_denoiser=weak.transformer)):
        guided = run(pipe, "sd3", 1.0, latents=start)
    assert torch.allclose(guided, k + 3.0 * (c - k), atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [PerturbedAttentionGuidance, lambda w: IntervalGuidance(guider=PerturbedAttentionGuidance(w), start=0.0, stop=1.0)],
)
def test_as_modular_pipelines_use_it(make):
    """One call for each prediction, between prepare_models and cleanup_models: the same as attach()."""
    pipe = guided_pipeline("sd3")
    guider, denoiser = make(5.0), pipe.transformer
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    cond, uncond, pooled, negative_pooled = pipe.encode_prompt("a red cat", None, None, max_sequence_length=16)
    data = {"encoder_hidden_states": (cond, uncond), "pooled_projections": (pooled, negative_pooled)}
    guider.set_state(0, 1, torch.tensor(1000.0))
    batches = guider.prepare_inputs(data)
    kinds = []
    for batch in batches:
        guider.prepare_models(denoiser)
        kinds.append(guider.is_conditional)
        inputs = {name: getattr(batch, name) for name in data}
        with torch.no_grad():
            batch.noise_pred = denoiser(latents, timestep=torch.tensor([1000.0]), return_dict=False, **inputs)[0]
        guider.cleanup_models(denoiser)
    assert kinds == [True, False, True]
    ours = latents - guider(batches).pred  # one step of Euler from sigma 1 to 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    with attach(pipe, make(5.0)):
        attached = run(pipe, "sd3", latents=latents)
    assert torch.allclose(ours, attached, atol=1e-5)


def test_abstract():
    with pytest.raises(NotImplementedError):
        Guidance(2.0).combine(torch.ones(1, 1), torch.ones(1, 1))
