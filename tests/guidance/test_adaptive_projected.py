"""APG against an independent reference, Diffusers' own formula, and what the paper's equations imply."""

import math

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from trimtab.guidance import AdaptiveProjectedGuidance, AffinePrediction, adaptive_projected_guidance, project
from trimtab.guidance.adaptive_projected import PRESETS

SHAPE = (3, 4, 6, 5)
PLAIN = {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_rescale": 0.0, "eta": 1.0}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference_step(x0_cond, x0_uncond, previous, *, w, r, beta, eta):
    """Algorithm 1 of the paper, one picture at a time, on flat numpy arrays."""
    guided, differences = [], []
    for k in range(len(x0_cond)):
        c, u = x0_cond[k].ravel(), x0_uncond[k].ravel()
        d = (c - u) + (beta * previous[k].ravel() if previous is not None else 0.0)
        differences.append(d.reshape(x0_cond[k].shape))
        norm = math.sqrt(float(np.dot(d, d)))
        if r > 0 and norm > r:
            d = d * (r / norm)
        e = c / math.sqrt(float(np.dot(c, c)))
        parallel = np.dot(d, e) * e
        guided.append((c + (w - 1) * ((d - parallel) + eta * parallel)).reshape(x0_cond[k].shape))
    return np.stack(guided), np.stack(differences)


LEVELS = {
    "epsilon": [AffinePrediction.of("epsilon", math.sqrt(1 - s * s), s) for s in np.linspace(0.999, 0.02, 20)],
    "euler": [AffinePrediction.of("epsilon", 1.0, s) for s in np.geomspace(14.6, 0.03, 20)],
    "v_prediction": [AffinePrediction.of("v_prediction", math.sqrt(1 - s * s), s) for s in np.linspace(1, 0.02, 20)],
    "flow": [AffinePrediction.of("flow_prediction", 1 - s, s) for s in np.linspace(1, 0.02, 20)],
    "sample": [AffinePrediction.of("sample", 1 - s, s) for s in np.linspace(1, 0.02, 20)],
}


@pytest.mark.parametrize("kind", LEVELS)
def test_twenty_steps_with_momentum_against_the_reference(kind):
    settings = {"w": 12.0, "r": 4.0, "beta": -0.5, "eta": 0.3}
    guider = AdaptiveProjectedGuidance(
        settings["w"],
        adaptive_projected_guidance_momentum=settings["beta"],
        adaptive_projected_guidance_rescale=settings["r"],
        eta=settings["eta"],
    )
    previous = None
    for step, at in enumerate(LEVELS[kind]):
        x, c, u = (random(seed=3 * step + k) for k in range(3))
        guider.set_state(step, 20, None)
        guider.set_sample(x, at)
        ours = guider(_batches(guider, c, u)).pred
        x0_c, x0_u = ((at.skip * x + at.out * o).numpy() for o in (c, u))
        guided, previous = reference_step(x0_c, x0_u, previous, **settings)
        theirs = (torch.from_numpy(guided) - at.skip * x) / at.out
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max(), step


def _batches(guider, c, u):
    batches = guider.prepare_inputs({})
    for batch, prediction in zip(batches, (c, u), strict=False):
        batch.noise_pred = prediction
    return batches


def test_function_against_the_reference():
    previous = buffer = None
    for step in range(20):
        c, u = random(seed=2 * step), random(seed=2 * step + 1)
        ours, buffer = adaptive_projected_guidance(c, u, 7.0, eta=0.0, rescale=2.5, momentum=-0.75, buffer=buffer)
        theirs, previous = reference_step(c.numpy(), u.numpy(), previous, w=7.0, r=2.5, beta=-0.75, eta=0.0)
        assert np.abs(ours.numpy() - theirs).max() <= 1e-12 * np.abs(theirs).max()
        assert np.abs(buffer.numpy() - previous).max() <= 1e-12


@pytest.mark.parametrize("beta", [None, -0.5])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("r", [0.0, 3.0])
def test_raw_space_is_diffusers_original_formulation(beta, eta, r):
    """Its guidance_scale there is the paper's w - 1."""
    guider = AdaptiveProjectedGuidance(
        9.0,
        adaptive_projected_guidance_momentum=beta,
        adaptive_projected_guidance_rescale=r,
        eta=eta,
        space="raw",
    )
    buffer = None if beta is None else MomentumBuffer(beta)
    for step in range(5):
        c, u = random(seed=2 * step), random(seed=2 * step + 1)
        guider.set_state(step, 5, None)
        ours = guider(_batches(guider, c, u)).pred
        theirs = normalized_guidance(c, u, 8.0, buffer, eta, r, use_original_formulation=True)
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_diffusers_default_formulation_lacks_the_parallel_part():
    """The trap of its default: u + w * update is ours minus the whole of d_par, whatever w is."""
    c, u = random(seed=1), random(seed=2)
    parallel, _ = project(c - u, c)
    for w in (2.0, 9.0):
        ours, _ = adaptive_projected_guidance(c, u, w, rescale=None, momentum=None)
        theirs = normalized_guidance(c, u, w, None, 0.0, 0.0, use_original_formulation=False)
        assert torch.allclose(ours - theirs, parallel, atol=1e-12)


@pytest.mark.parametrize("space", ["x0", "raw"])
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 1e-3)])
def test_plain_settings_are_classifier_free_guidance(kind, space, dtype, tolerance):
    guider = AdaptiveProjectedGuidance(5.0, space=space, **PLAIN)
    for step, at in enumerate(LEVELS[kind]):
        x, c, u = (random(seed=3 * step + k, dtype=dtype) for k in range(3))
        guider.set_state(step, 20, None)
        guider.set_sample(x, at)
        ours = guider(_batches(guider, c, u)).pred
        assert ours.dtype == dtype
        plain = u.double() + 5.0 * (c.double() - u.double())
        assert (ours.double() - plain).abs().max() <= tolerance * plain.abs().max()


def test_update_is_orthogonal_and_bounded():
    c, u = random(seed=1), random(seed=2)
    guided, _ = adaptive_projected_guidance(c, u, 10.0, rescale=1.5, momentum=None)
    update = (guided - c).flatten(1)
    flat = c.flatten(1)
    cosine = (update * flat).sum(1) / (update.norm(dim=1) * flat.norm(dim=1))
    assert cosine.abs().max() <= 1e-10
    assert (update.norm(dim=1) <= 9 * 1.5 * (1 + 1e-12)).all()
    whole, _ = adaptive_projected_guidance(c, u, 10.0, rescale=1.5, momentum=None, eta=1.0)
    assert torch.allclose((whole - c).flatten(1).norm(dim=1), torch.tensor(9 * 1.5, dtype=torch.float64))


@pytest.mark.parametrize("beta", [-0.5, -0.75, 0.5])
def test_constant_difference_settles(beta):
    """A geometric series: the buffer tends to difference / (1 - beta)."""
    c, u = random(seed=1), random(seed=2)
    buffer = None
    for _ in range(120):
        _, buffer = adaptive_projected_guidance(c, u, 3.0, momentum=beta, buffer=buffer)
    assert torch.allclose(buffer, (c - u) / (1 - beta), atol=1e-10)


def test_items_of_a_batch_do_not_mix():
    c, u = random(seed=1), 5 * random(seed=2)
    whole, _ = adaptive_projected_guidance(c, u, 6.0, rescale=3.0)
    single = torch.cat([adaptive_projected_guidance(c[k : k + 1], u[k : k + 1], 6.0, rescale=3.0)[0] for k in range(3)])
    assert torch.allclose(whole, single, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 7), (2, 9, 4), (2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_latents_of_any_rank(shape):
    """Packed latents and videos: norms run over all dimensions but the batch."""
    c, u = random(*shape, seed=1), random(*shape, seed=2)
    flat, _ = adaptive_projected_guidance(c.flatten(1), u.flatten(1), 6.0, rescale=1.0)
    assert torch.allclose(adaptive_projected_guidance(c, u, 6.0, rescale=1.0)[0], flat.view(shape), atol=1e-13)


def test_project():
    v, ref = random(seed=1), random(seed=2)
    parallel, orthogonal = project(v, ref)
    assert torch.allclose(parallel + orthogonal, v, atol=1e-13)
    assert (orthogonal * ref).flatten(1).sum(1).abs().max() <= 1e-12
    assert torch.allclose(project(parallel, ref)[0], parallel, atol=1e-13)  # a projection, twice is once
    assert torch.allclose(project(v, -3 * ref)[0], parallel, atol=1e-13)
    zero = project(v, torch.zeros_like(ref))
    assert not zero[0].any() and torch.equal(zero[1], v)


def test_degenerate_inputs():
    c, u = random(seed=1), random(seed=2)
    same, _ = adaptive_projected_guidance(c, c, 9.0)
    assert torch.equal(same, c)
    assert torch.isfinite(adaptive_projected_guidance(torch.zeros_like(c), u, 9.0)[0]).all()
    broken = c.clone()
    broken[0, 0, 0, 0] = math.nan
    result, _ = adaptive_projected_guidance(broken, u, 9.0)
    assert result[0].isnan().all() and result[1:].isfinite().all()


def test_large_half_latent_does_not_lose_its_update():
    """Squares of a half latent overflow: the norm is taken in float64, where Diffusers' update vanishes."""
    c, u = 200 * random(1, 16, 64, 64, seed=1).half(), 200 * random(1, 16, 64, 64, seed=2).half()
    ours, _ = adaptive_projected_guidance(c, u, 2.0, rescale=1000.0, momentum=None, eta=1.0)
    assert (ours - c).double().norm() == pytest.approx(1000.0, rel=0.02)


def test_gradient_is_finite_where_nothing_is_guided():
    c = random(seed=1).requires_grad_()
    adaptive_projected_guidance(c, c.detach(), 5.0)[0].sum().backward()
    assert torch.isfinite(c.grad).all()


def test_gradient():
    c, u = random(2, 3, 2, seed=1).requires_grad_(), random(2, 3, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: adaptive_projected_guidance(a, b, 4.0, rescale=1.0)[0], (c, u))


def test_scheme_for_solvers_that_evaluate_twice():
    """Two evaluations of a step use one previous difference; the first of them is kept."""
    guider = AdaptiveProjectedGuidance(5.0, space="raw", adaptive_projected_guidance_rescale=0)
    pairs = [(random(seed=2 * k), random(seed=2 * k + 1)) for k in range(4)]
    for step in range(2):
        guider.set_state(step, 2, None)
        results = [guider(_batches(guider, *pairs[2 * step + k])).pred for k in range(2)]
    first = pairs[0][0] - pairs[0][1]
    for k in range(2):
        c, u = pairs[2 + k]
        assert torch.allclose(
            results[k], adaptive_projected_guidance(c, u, 5.0, rescale=None, buffer=first)[0], atol=1e-12
        )


@pytest.mark.parametrize("why", ["step 0", "shape", "sigma"])
def test_buffer_is_dropped(why):
    guider = AdaptiveProjectedGuidance(5.0)
    at = AffinePrediction.of("flow_prediction", 0.5, 0.5)
    c, u, x = random(seed=1), random(seed=2), random(seed=3)
    guider.set_state(0, 4, None)
    guider.set_sample(x, at)
    fresh = guider(_batches(guider, c, u)).pred
    guider.set_state(1, 4, None)
    guider.set_sample(x, at)
    assert not torch.allclose(guider(_batches(guider, c, u)).pred, fresh)
    if why == "step 0":
        guider.set_state(0, 4, None)
    else:
        guider.set_state(2, 4, None)
    if why == "sigma":
        at = AffinePrediction.of("flow_prediction", 0.4, 0.6)
        guider.set_sample(x, at)
        x0 = [x - 0.6 * o for o in (c, u)]
        expected = (adaptive_projected_guidance(*x0, 5.0)[0] - x) / -0.6
        assert torch.allclose(guider(_batches(guider, c, u)).pred, expected, atol=1e-12)
        return
    if why == "shape":
        c, u, x, fresh = c[:2], u[:2], x[:2], fresh[:2]
    guider.set_sample(x, at)
    assert torch.allclose(guider(_batches(guider, c, u)).pred, fresh, atol=1e-12)


def test_rms_threshold_is_free_of_size():
    by_rms = AdaptiveProjectedGuidance(5.0, space="raw", adaptive_projected_guidance_rescale_rms=15 / 256)
    for side in (32, 128):
        c, u = random(1, 4, side, side, seed=1), random(1, 4, side, side, seed=2)
        by_norm = AdaptiveProjectedGuidance(5.0, space="raw", adaptive_projected_guidance_rescale=15 / 256 * 2 * side)
        results = []
        for guider in (by_rms, by_norm):
            guider.set_state(0, 1, None)
            results.append(guider(_batches(guider, c, u)).pred)
        assert torch.allclose(*results, atol=1e-12)


def test_window_and_scale_one_need_no_second_prediction():
    guider = AdaptiveProjectedGuidance(5.0, start=0.25, stop=0.75)
    wanted = []
    for step in range(8):
        guider.set_state(step, 8, None)
        wanted.append(len(guider.wanted))
    assert wanted == [1, 1, 2, 2, 2, 2, 1, 1]
    assert AdaptiveProjectedGuidance(1.0).num_conditions == 1
    assert AdaptiveProjectedGuidance(5.0, enabled=False).num_conditions == 1


def test_scale_as_a_function_of_sigma():
    at = AffinePrediction.of("flow_prediction", 0.25, 0.75)
    c, u, x = random(seed=1), random(seed=2), random(seed=3)
    results = []
    for scale in (lambda sigma: 1 + 4 * sigma, 4.0):
        guider = AdaptiveProjectedGuidance(scale)
        guider.set_state(0, 1, None)
        guider.set_sample(x, at)
        results.append(guider(_batches(guider, c, u)).pred)
    assert torch.equal(*results)


def test_saves_and_loads(tmp_path):
    for guider in (
        AdaptiveProjectedGuidance(11.0, eta=0.25, start=0.1, stop=0.9, space="raw"),
        AdaptiveProjectedGuidance(11.0, adaptive_projected_guidance_rescale_rms=0.06),
        AdaptiveProjectedGuidance(11.0, adaptive_projected_guidance_rescale=None),
    ):
        guider.save_pretrained(tmp_path)
        assert (tmp_path / "guider_config.json").is_file()
        again = AdaptiveProjectedGuidance.from_pretrained(tmp_path)
        assert again.to_json_string() == guider.to_json_string()
        assert (again.rescale, again.rescale_rms) == (guider.rescale, guider.rescale_rms)
    assert guider.new(guidance_scale=3.0).guidance_scale == 3.0
    with pytest.raises(ValueError, match="function"):
        AdaptiveProjectedGuidance(lambda sigma: 2.0).save_pretrained(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    guider = AdaptiveProjectedGuidance.from_preset(name)
    assert guider.eta == 0 and guider.momentum < 0 and guider.guidance_scale > 1
    assert (guider.rescale is None) != (guider.rescale_rms is None) and (guider.rescale or guider.rescale_rms) > 0
    assert AdaptiveProjectedGuidance.from_preset(name, guidance_scale=2.0, eta=0.5).eta == 0.5
    assert AdaptiveProjectedGuidance.from_preset(name, adaptive_projected_guidance_rescale_rms=0.1).rescale is None
    assert AdaptiveProjectedGuidance.from_preset(name, adaptive_projected_guidance_rescale=3.0).rescale_rms is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": "7"}, "guidance_scale"),
        ({"adaptive_projected_guidance_momentum": 1.0}, "momentum"),
        ({"adaptive_projected_guidance_momentum": -1.5}, "momentum"),
        ({"adaptive_projected_guidance_momentum": math.nan}, "momentum"),
        ({"adaptive_projected_guidance_rescale": math.nan}, "rescale"),
        (
            {"adaptive_projected_guidance_rescale": 15.0, "adaptive_projected_guidance_rescale_rms": 0.06},
            "not both",
        ),
        ({"eta": math.nan}, "eta"),
        ({"space": "latent"}, "space"),
        ({"start": 1.5}, "start"),
        ({"start": 0.5, "stop": 0.2}, "stop"),
    ],
)
def test_bad_settings(arguments, word):
    with pytest.raises(ValueError, match=word):
        AdaptiveProjectedGuidance(**arguments)


def test_bad_calls():
    guider = AdaptiveProjectedGuidance(5.0)
    guider.set_state(0, 1, None)
    c, u = random(seed=1), random(seed=2)
    with pytest.raises(RuntimeError, match="noisy latent"):
        guider(_batches(guider, c, u))
    with pytest.raises(ValueError, match="one shape"):
        guider(_batches(guider, c, u[:1]))
    with pytest.raises(ValueError, match="one shape"):
        adaptive_projected_guidance(c, u[:1], 5.0)
    with pytest.raises(ValueError, match="momentum"):
        adaptive_projected_guidance(c, u, 5.0, momentum=-1.0)
    with pytest.raises(ValueError, match="must be one of"):
        AdaptiveProjectedGuidance.from_preset("sdxxl")
