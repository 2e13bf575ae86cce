"""The rules' formulas, each against an independent computation, and what all rules have in common."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.guiders.magnitude_aware_guidance import mambo_guidance
from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance as tcfg_by_svd

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab import guidance
from trimtab.guidance import (
    GUIDERS,
    AffinePrediction,
    AutoGuidance,
    CFGPlusPlusGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    GuidanceRescale,
    IntervalGuidance,
    MagnitudeAwareGuidance,
    NoiseSchedule,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
    from_laplacian_pyramid,
    laplacian_pyramid,
    tangential,
)

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

SHAPE = (3, 4, 6, 5)
HERE = AffinePrediction.of("flow_prediction", 0.4, 0.6)
AFTER = AffinePrediction.of("flow_prediction", 0.55, 0.45)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apply(guider, *predictions, x=None, at=HERE, after=AFTER, step=3, steps=10):
    guider.set_state(step, steps, None)
    guider.set_sample(x, at, after)
    batches = guider.prepare_inputs({})
    given = dict(zip(("pred_cond", "pred_uncond", "pred_cond_skip"), predictions, strict=False))
    for batch, name in zip(batches, guider.wanted, strict=True):
        batch.noise_pred = given[name]
    return guider(batches).pred


def plain_cfg(c, u, w):
    return u + w * (c - u)


# ---- all rules ---------------------------------------------------------------------------------------------


def scale_for(name):
    return 0.6 if name == "cfg++" else 4.0


@pytest.mark.parametrize("name", GUIDERS)
def test_made_from_a_scale_saved_and_loaded(name, tmp_path):
    guider = GUIDERS[name](guidance_scale=scale_for(name))
    guider.save_pretrained(tmp_path)
    assert (tmp_path / "guider_config.json").is_file()
    again = GUIDERS[name].from_pretrained(tmp_path)
    assert again.to_json_string() == guider.to_json_string()
    tensors = [random(seed=k) for k in range(3)]
    assert torch.equal(apply(again, *tensors, x=random(seed=9)), apply(guider, *tensors, x=random(seed=9)))
    assert isinstance(guider, diffusers.guiders.guider_utils.BaseGuidance)


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_dtype_and_items_of_a_batch(name, dtype):
    guider = GUIDERS[name](guidance_scale=scale_for(name))
    tensors = [random(seed=k, dtype=dtype) for k in range(4)]
    result = apply(guider, *tensors[:3], x=tensors[3])
    assert result.shape == SHAPE and result.dtype == dtype and torch.isfinite(result).all()
    for k in range(SHAPE[0]):
        guider.reset()
        single = apply(guider, *(t[k : k + 1] for t in tensors[:3]), x=tensors[3][k : k + 1])
        assert torch.allclose(single[0].double(), result[k].double(), atol=1e-10 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("name", GUIDERS)
def test_equal_predictions_need_no_guidance(name):
    """Where c = u = k, every rule returns c."""
    c = random(seed=1)
    result = apply(GUIDERS[name](guidance_scale=scale_for(name)), c, c, c, x=random(seed=2))
    if name == "tcfg":
        assert torch.allclose(result, c, atol=1e-9)
    else:
        assert torch.allclose(result, c, atol=1e-12)


@pytest.mark.parametrize("name", GUIDERS)
def test_a_scale_that_is_no_number(name):
    for bad in (math.nan, math.inf, -1.0, "7", True):
        with pytest.raises(ValueError, match="scale"):
            GUIDERS[name](guidance_scale=bad)


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guiders_module_names_the_base(name):
    """Diffusers looks for BaseGuidance in the module of a guider that it loads with a pipeline."""
    import sys

    assert hasattr(sys.modules[GUIDERS[name].__module__], "BaseGuidance")


def test_exports():
    assert all(hasattr(guidance, name) for name in guidance.__all__)
    assert list(guidance.__all__)[1:] == sorted(guidance.__all__[1:])


# ---- each rule ---------------------------------------------------------------------------------------------


def test_cfg():
    c, u = random(seed=1), random(seed=2)
    assert torch.allclose(apply(ClassifierFreeGuidance(3.0), c, u), 3 * c - 2 * u, atol=1e-13)
    assert torch.equal(apply(ClassifierFreeGuidance(1.0), c, u), c)


DETERMINISTIC = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "ddim-v": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_cfg_plus_plus_step(kind):
    """An ordinary step on the rule's result is the paper's: guided data, unconditional noise."""
    cls, config = DETERMINISTIC[kind]
    scheduler = cls(**config)
    scheduler.set_timesteps(5)
    schedule = NoiseSchedule(scheduler)
    x = random(seed=0, dtype=torch.float32) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    guider = CFGPlusPlusGuidance(0.7)
    for i, t in enumerate(scheduler.timesteps):
        c, u = random(seed=2 * i + 1, dtype=torch.float32), random(seed=2 * i + 2, dtype=torch.float32)
        here, after = schedule[i], schedule[i + 1]
        g = apply(guider, c, u, x=x, at=here, after=after, step=i, steps=5)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        ours = scheduler.step(g, t, x).prev_sample
        d_c, d_u = (here.skip * x + here.out * o for o in (c, u))
        data = d_u + 0.7 * (d_c - d_u)
        noise = (x - here.alpha * d_u) / here.sigma  # x = alpha D + sigma n for the unconditional branch
        theirs = after.alpha * data + after.sigma * noise
        assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max(), i
        x = ours


def test_zero_star_against_diffusers():
    c, u = random(seed=1), random(seed=2)
    ours, theirs = ClassifierFreeZeroStarGuidance(4.0), diffusers.ClassifierFreeZeroStarGuidance(4.0)
    for step in range(3):
        ours.set_state(step, 10, None)
        theirs.set_state(step, 10, None)
        assert torch.allclose(apply(ours, c, u, step=step), theirs.forward(c, u).pred, atol=1e-6), step
    assert not apply(ours, c, u, step=0).any()
    ours.set_state(0, 10, None)
    assert ours.wanted == ["pred_cond"]


def test_zero_star_by_hand():
    c, u = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    g = apply(ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0), c, u)
    assert torch.allclose(g, torch.tensor([[4.0, -2.0]]))  # a = 1: u + 3 (c - u)
    g = apply(ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0), c, 2 * u)
    assert torch.allclose(g, torch.tensor([[4.0, -2.0]]))  # the scale of u does not matter


def test_tcfg_against_the_decomposition():
    for seed in range(4):
        c, u = random(seed=seed), random(seed=seed + 10)
        ours = apply(TangentialClassifierFreeGuidance(4.0), c, u)
        assert torch.allclose(ours.float(), tcfg_by_svd(c.float(), u.float(), 4.0), atol=1e-5)
        stacked = torch.stack([c.flatten(1), u.flatten(1)], 1)
        v = torch.linalg.svd(stacked, full_matrices=False).Vh[:, 0]
        expected = (u.flatten(1) * v).sum(1, keepdim=True) * v
        assert torch.allclose(tangential(c, u).flatten(1), expected, atol=1e-12)


def test_tcfg_degenerate():
    c, u = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert torch.equal(tangential(c, u), u)
    assert torch.isfinite(tangential(u, u)).all()


def test_mambo_g_against_diffusers():
    c, u = random(seed=1), random(seed=2)
    theirs = mambo_guidance(c.flatten(1), u.flatten(1), 10.0, 0.7)  # it takes no norm over three dimensions
    assert torch.allclose(apply(MagnitudeAwareGuidance(10.0, alpha=0.7), c, u).flatten(1), theirs, atol=1e-12)
    assert torch.allclose(apply(MagnitudeAwareGuidance(10.0, alpha=0.0), c, u), plain_cfg(c, u, 10.0))


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 2, 7, 9), (1, 1, 3, 2), (2, 4, 1, 5)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_laplacian_pyramid_is_invertible(shape, levels):
    pictures = random(*shape)
    pyramid = laplacian_pyramid(pictures, levels)
    assert len(pyramid) == levels
    assert torch.allclose(from_laplacian_pyramid(pyramid), pictures, atol=1e-12)


def test_laplacian_pyramid_parts_frequencies():
    """A constant has no details; a checkerboard has nothing else."""
    flat = torch.full((1, 1, 16, 16), 3.0, dtype=torch.float64)
    details, rest = laplacian_pyramid(flat, 2)
    assert details.abs().max() <= 1e-12 and torch.allclose(rest, torch.full_like(rest, 3.0))
    rows = torch.arange(16)
    checks = (1.0 - 2.0 * ((rows[:, None] + rows) % 2)).double().view(1, 1, 16, 16)
    details, rest = laplacian_pyramid(checks, 2)
    assert rest.abs().max() <= 1e-12 and torch.allclose(details, checks)


def test_fdg():
    c, u = random(2, 3, 16, 16, seed=1), random(2, 3, 16, 16, seed=2)
    same = apply(FrequencyDecoupledGuidance(guidance_scales=[4.0, 4.0, 4.0]), c, u)
    assert torch.allclose(same, plain_cfg(c, u, 4.0), atol=1e-12)  # one scale: plain guidance
    split = apply(FrequencyDecoupledGuidance(guidance_scales=[10.0, 1.0]), c, u)
    low = [laplacian_pyramid(t, 2)[1] for t in (split, c)]
    expected = [laplacian_pyramid(t, 2) for t in (c, u)]
    by_hand = [plain_cfg(a, b, w) for a, b, w in zip(*expected, (10.0, 1.0), strict=True)]
    assert torch.allclose(split, from_laplacian_pyramid(by_hand), atol=1e-12)
    assert low[0].shape == low[1].shape
    flat = c.mean((2, 3), keepdim=True).expand_as(c), u.mean((2, 3), keepdim=True).expand_as(u)
    assert torch.allclose(
        apply(FrequencyDecoupledGuidance(10.0, guidance_scales=[10.0, 2.0]), *flat), plain_cfg(*flat, 2.0), atol=1e-12
    )  # a flat difference is all low frequency


def test_fdg_parallel_weights_and_videos():
    c, u = random(2, 3, 4, 8, 8, seed=1), random(2, 3, 4, 8, 8, seed=2)
    guider = FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0], parallel_weights=[0.0, 1.0])
    whole = apply(guider, c, u)
    assert whole.shape == c.shape
    plain = FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0])
    frames = torch.stack([apply(plain, c[:, :, k], u[:, :, k]) for k in range(4)], 2)
    assert torch.allclose(apply(plain, c, u), frames, atol=1e-12)
    assert not torch.allclose(whole, frames)
    with pytest.raises(ValueError, match="frequencies need latents"):
        apply(plain, c.flatten(2), u.flatten(2))
    with pytest.raises(ValueError, match="parallel_weights"):
        FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0], parallel_weights=[1.0])


def test_rescale():
    c, u = random(seed=1), random(seed=2)
    full = apply(GuidanceRescale(9.0, 1.0), c, u)
    assert torch.allclose(full.std((1, 2, 3)), c.std((1, 2, 3)), atol=1e-12)
    for phi in (0.0, 0.7):
        theirs = rescale_noise_cfg(plain_cfg(c, u, 9.0), c, phi)
        assert torch.allclose(apply(GuidanceRescale(9.0, phi), c, u), theirs, atol=1e-12)


def test_rescale_wraps_any_rule():
    c, u, x = random(seed=1), random(seed=2), random(seed=3)
    inner = guidance.AdaptiveProjectedGuidance(9.0, adaptive_projected_guidance_rescale=2.0)
    expected = rescale_noise_cfg(apply(inner, c, u, x=x), c, 0.5)
    assert torch.allclose(apply(GuidanceRescale(guider=inner, guidance_rescale=0.5), c, u, x=x), expected, atol=1e-12)
    nested = IntervalGuidance(guider=GuidanceRescale(guider=inner, guidance_rescale=0.5), sigma_range=(0.5, 0.7))
    again = IntervalGuidance.from_config(nested.config)
    assert torch.allclose(apply(again, c, u, x=x), expected, atol=1e-12)
    with pytest.raises(ValueError, match="not both"):
        GuidanceRescale(guidance_scale=3.0, guider=inner)
    with pytest.raises(TypeError, match="guider"):
        GuidanceRescale(guider=diffusers.ClassifierFreeGuidance(3.0))
    with pytest.raises(ValueError, match="must name one of"):
        GuidanceRescale(guider={"_class_name": "Nothing"})


@pytest.mark.parametrize(("level", "guided"), [(0.19, False), (0.2, True), (1.61, True), (1.62, False), (14.0, False)])
def test_interval_in_sigma(level, guided):
    """s_lo < s <= s_hi, in sigma / alpha whatever the convention of the scheduler's latents."""
    guider = IntervalGuidance(3.0, sigma_range=(0.19, 1.61))
    power = math.sqrt(1 + level * level)
    for at in (
        AffinePrediction.of("epsilon", 1.0, level),
        AffinePrediction.of("v_prediction", 1 / power, level / power),
    ):
        c, u = random(seed=1), random(seed=2)
        guider.set_state(0, 10, None)
        guider.set_sample(None, at)
        if level not in (0.19, 1.61):  # the ends are exact in one convention only
            assert guider.wanted == (["pred_cond", "pred_uncond"] if guided else ["pred_cond"])
            assert torch.equal(apply(guider, c, u, at=at), plain_cfg(c, u, 3.0) if guided else c)
    guider.set_sample(None, AffinePrediction.of("epsilon", 1.0, level))
    assert guider.is_guided == guided


def test_interval_in_steps():
    guider = IntervalGuidance(3.0, start=0.3, stop=0.6)
    guided = []
    for step in range(10):
        guider.set_state(step, 10, None)
        guided.append(guider.is_guided)
    assert guided == [False] * 3 + [True] * 3 + [False] * 4
    assert guider.wanted == ["pred_cond"] and guider.num_conditions == 2  # of the step, of the run
    for bad in ((1.0,), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="sigma_range"):
            IntervalGuidance(3.0, sigma_range=bad)


def test_scale_as_a_function():
    """w(sigma) holds in every rule that takes it; w = 1 asks for nothing."""
    c, u = random(seed=1), random(seed=2)
    guider = ClassifierFreeGuidance(lambda sigma: 10 * sigma)
    assert torch.allclose(apply(guider, c, u), plain_cfg(c, u, 6.0))  # sigma is 0.6 here
    assert apply(ClassifierFreeGuidance(lambda sigma: 1.0), c, u) is c
    with pytest.raises(ValueError, match="finite"):
        apply(ClassifierFreeGuidance(lambda sigma: math.nan), c, u)


def test_weakened_predictions():
    c, u, k = (random(seed=s) for s in range(3))
    pag = PerturbedAttentionGuidance(4.0, perturbed_guidance_scale=3.0)
    assert torch.allclose(apply(pag, c, u, k), u + 4 * (c - u) + 3 * (c - k))
    alone = PerturbedAttentionGuidance(1.0, perturbed_guidance_scale=3.0)
    assert torch.allclose(apply(alone, c, None, k), c + 3 * (c - k))
    assert alone.wanted == ["pred_cond", "pred_cond_skip"]
    auto = AutoGuidance(2.5)
    assert torch.allclose(apply(auto, c, None, k), k + 2.5 * (c - k))
    slg = SkipLayerGuidance(4.0, skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.3)
    seen = []
    for step in range(5):
        slg.set_state(step, 10, None)
        seen.append(slg.wanted[-1])
    assert seen == ["pred_uncond", "pred_cond_skip", "pred_cond_skip", "pred_uncond", "pred_uncond"]
    with pytest.raises(ValueError, match="layers"):
        SkipLayerGuidance(4.0, skip_layer_guidance_layers=[])


def test_cfg_is_affine():
    """In x0 space and in the network's own, plain guidance is one rule: numpy, one item at a time."""
    x, c, u = (random(seed=s) for s in range(3))
    g = apply(ClassifierFreeGuidance(5.0), c, u).numpy()
    for at in (HERE, AffinePrediction.of("epsilon", 0.8, 0.6), AffinePrediction.of("v_prediction", 0.8, 0.6)):
        d_c, d_u = ((at.skip * x + at.out * o).numpy() for o in (c, u))
        assert np.allclose(at.skip * x.numpy() + at.out * g, d_u + 5.0 * (d_c - d_u), atol=1e-12)
