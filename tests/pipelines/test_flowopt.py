"""What an edit does beside the update itself: streams, choices, masks, precision, traces."""

import inspect
from typing import Any

import diffusers
import pytest
import torch

from tests.pipelines.test_flowopt_families import edit_call, encoded, flowopt, picture, stock_pipeline
from tests.pipelines.test_generation_map import seeded
from tests.pipelines.test_generation_map_inputs import changes, state
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.pipelines import FlowOptPipeline
from trimtab.pipelines.flowopt_choice import psnr
from trimtab.pipelines.flowopt_mask import feather, latent_mask
from trimtab.pipelines.flowopt_schedules import inverse_of, sampler_of

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

RUN = {"num_inference_steps": 4, "strength": 0.75, "guidance_scale": 3.0, "max_sequence_length": 16}
PROMPTS = {"prompt": "two dog on a sky background", "source_prompt": "a red cat"}


@pytest.fixture
def pipe():
    return flowopt("sd3", stock_pipeline("sd3"))


def edit(pipe, **options: Any):
    arguments = {"image": picture("sd3"), "step_size": 0.1, "num_optimization_steps": 3, **PROMPTS, **RUN} | options
    return pipe(**arguments)


# ---- states and results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceleration", ["none", "anderson", "inverse"])
def test_a_stream_gives_the_states_of_the_call(pipe, acceleration):
    result = edit(pipe, acceleration=acceleration, keep_history=True, output_type="pt")
    arguments = {"image": picture("sd3"), "step_size": 0.1, "num_optimization_steps": 3, "acceleration": acceleration}
    states = list(pipe.stream(**arguments, **PROMPTS, **RUN))
    assert [s.iteration for s in states] == [0, 1, 2, 3] == [s.iteration for s in result.history]
    for ours, kept in zip(states, result.history, strict=True):
        assert torch.equal(ours.latents, kept.latents) and torch.equal(ours.noise, kept.noise)
        assert torch.equal(ours.residuals, kept.residuals)
        assert ours.num_function_evaluations == kept.num_function_evaluations
        assert ours.latents.dtype == ours.noise.dtype == torch.float32
    assert torch.equal(states[-1].images, result.images)
    assert torch.equal(result.residuals, torch.stack([s.residuals for s in states]))
    assert result.num_function_evaluations == states[-1].num_function_evaluations


def test_a_stream_stops_when_nobody_asks_for_more(pipe):
    calls = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(1))
    stream = pipe.stream(image=picture("sd3"), step_size=0.1, **PROMPTS, **RUN)
    assert not calls  # the prompts are encoded, the network hasn't run
    next(stream)
    start = len(calls)
    assert start == 4 + 3  # Uni-Inv and one pass, guided in one call
    next(stream)
    assert len(calls) == start + 3
    stream.close()


def test_decoding_waits_until_pictures_are_asked_for(pipe):
    decoded = []
    pipe.vae.decoder.register_forward_hook(lambda *args: decoded.append(1))
    result = edit(pipe, keep_history=True, output_type="latent")
    assert not decoded
    assert result.history[1].images.shape == (1, 3, 16, 16) and len(decoded) == 1
    assert torch.equal(result.images, result.latents)
    edit(pipe)
    assert len(decoded) == 2


def test_without_history_nothing_is_kept(pipe):
    result = edit(pipe)
    assert result.history is None and result.scores is None and result.residuals.shape == (4, 1)
    assert result.selected.tolist() == [3] and result.step_size.tolist() == pytest.approx([0.1])


def test_text_encoders_run_once_a_prompt(pipe):
    calls = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipe, name).register_forward_hook(lambda module, *args: calls.append(module))
    pipe.generate("a cat", num_inference_steps=1, guidance_scale=3.0, output_type="latent", max_sequence_length=16)
    guided, calls[:] = len(calls), []
    edit(pipe, output_type="latent")
    assert len(calls) == guided + guided // 2  # the source isn't guided
    calls.clear()
    pipe.invert(picture("sd3"), "a red cat", num_inference_steps=2, max_sequence_length=16)
    assert len(calls) == guided // 2


def test_callbacks_and_stopping(pipe):
    seen = []

    def watch(given, iteration, state):
        seen.append((given, iteration, state.latents))
        return iteration == 1

    result = edit(pipe, callback_on_iteration_end=watch)
    assert [(given, iteration) for given, iteration, _ in seen] == [(pipe, 0), (pipe, 1)]
    assert torch.equal(result.latents, seen[1][2]) and len(result.residuals) == 2


def test_output_types(pipe):
    pt, np_, pil = (edit(pipe, output_type=kind).images for kind in ("pt", "np", "pil"))
    assert pt.shape == (1, 3, 16, 16) and np_.shape == (1, 16, 16, 3) and pil[0].size == (16, 16)
    assert torch.equal(torch.from_numpy(np_).movedim(-1, 1), pt)
    assert isinstance(edit(pipe, return_dict=False), tuple)


def test_a_batch_gives_what_its_pictures_give(pipe):
    pictures = torch.cat([picture("sd3"), picture("sd3").flip(2)])
    targets, sources = ["two dog", "a green apple"], ["a red cat", "a blue house"]
    options = {"acceleration": "anderson", "step_size": torch.tensor([0.1, 0.3]), "output_type": "pt"}
    both = edit(pipe, image=pictures, prompt=targets, source_prompt=sources, **options)
    for row in range(2):
        options["step_size"] = [0.1, 0.3][row]
        alone = edit(pipe, image=pictures[row], prompt=targets[row], source_prompt=sources[row], **options)
        torch.testing.assert_close(both.latents[row : row + 1], alone.latents, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(both.residuals[:, row], alone.residuals[:, 0], rtol=1e-3, atol=1e-5)
        assert both.num_function_evaluations == alone.num_function_evaluations
    shared = edit(pipe, image=pictures, prompt="two dog", source_prompt="a red cat", output_type="pt")
    assert shared.images.shape == (2, 3, 16, 16)


# ---- the step size -----------------------------------------------------------------------------------------


def test_the_default_steps_are_half_the_estimated_bound_together(pipe):
    arguments = {"image": picture("sd3"), **PROMPTS, **RUN}
    report = pipe.estimate_step_size(**arguments, local_points=1, global_points=1)
    default, chosen = (edit(pipe, step_size=eta, keep_history=True) for eta in (None, 0.5 * report.bound / 3))
    torch.testing.assert_close(default.step_size, 0.5 * report.bound / 3)  # three updates share it
    accelerated = edit(pipe, step_size=None, acceleration="anderson")
    torch.testing.assert_close(accelerated.step_size, 0.5 * report.bound)
    torch.testing.assert_close(default.latents, chosen.latents)
    assert report.num_function_evaluations == 3 and report.local_ratios.shape == (1, 1)
    passes = 3 * 2  # steps of the tail, guided
    assert default.num_function_evaluations == chosen.num_function_evaluations + 2 * passes  # f(x_0) is shared
    assert default.history[0].num_function_evaluations == 4 + 3 * passes
    other = pipe.estimate_step_size(**arguments, generator=seeded(5))
    assert other.local_ratios.shape == (6, 1) and other.global_ratios.shape == (3, 1)
    assert other.num_function_evaluations == 6 and other.bound != report.bound


def test_a_run_that_diverges_ends_with_its_best_and_a_warning(pipe):
    with pytest.warns(UserWarning, match=r"row \[0\] is beyond 10 times its start at iteration"):
        result = edit(pipe, step_size=200.0, acceleration="none", num_optimization_steps=30, selection="last")
    assert len(result.residuals) < 30
    assert result.residuals[-1] == result.residuals.min() and bool(result.latents.isfinite().all())


def test_inversion_by_the_inverse_is_faster_than_the_papers_update(pipe):
    arguments = {"image": picture("sd3"), "prompt": "a red cat", "num_inference_steps": 4, "max_sequence_length": 16}
    plain = pipe.invert(**arguments, acceleration="none", step_size=1.0, num_optimization_steps=4)
    faster = pipe.invert(**arguments, num_optimization_steps=1)
    torch.testing.assert_close(plain.residuals[0], faster.residuals[0])
    assert faster.num_function_evaluations < plain.num_function_evaluations
    assert faster.residuals[1] < 0.5 * plain.residuals[2]


# ---- choosing ----------------------------------------------------------------------------------------------


def test_a_function_chooses_the_iterate(pipe):
    wanted, seen = [0.1, 0.9, float("nan"), 0.3], []

    def reward(images, prompts):
        seen.append((images, prompts))
        return torch.full((len(images),), wanted[len(seen) - 1])

    result = edit(pipe, selection=reward, keep_history=True, output_type="pt")
    assert result.selected.tolist() == [1]
    assert torch.equal(result.latents, result.history[1].latents)
    assert torch.equal(result.images, seen[1][0]) and seen[1][1] == [PROMPTS["prompt"]]
    torch.testing.assert_close(result.scores, torch.tensor(wanted)[:, None], equal_nan=True)
    expected = torch.stack([psnr(images, picture("sd3")) for images, _ in seen])
    torch.testing.assert_close(result.similarities, expected)
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).item() == pytest.approx(20.0)


def test_rows_are_chosen_by_themselves(pipe):
    scores = iter(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.2, 0.2]]))
    pictures = picture("sd3").expand(2, -1, -1, -1)
    result = edit(pipe, image=pictures, selection=lambda images, prompts: next(scores), keep_history=True)
    assert result.selected.tolist() == [1, 0]
    assert torch.equal(result.latents[0], result.history[1].latents[0])
    assert torch.equal(result.latents[1], result.history[0].latents[1])


def test_an_edit_is_never_chosen_by_its_residual():
    """That would be the source. Every default is the last iterate, and the name isn't taken."""
    assert (
        inspect.signature(FlowOptPipeline.from_pipe(tiny_pipeline("sd3")).__call__).parameters["selection"].default
        == "last"
    )


# ---- masks -------------------------------------------------------------------------------------------------


def test_a_mask_keeps_the_rest_of_the_picture(pipe):
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1.0
    result, free = (edit(pipe, mask_image=m, output_type="pt", num_optimization_steps=0) for m in (mask, None))
    source = picture("sd3")[0]
    outside = mask[0] == 0
    assert torch.equal(result.images[0][:, outside], source[:, outside])
    assert (result.images[0] - source).abs()[:, 5:11, 5:11].mean() > 0.05
    assert (free.images[0] - source).abs()[:, outside].mean() > 0.05


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen-image", "flux-2-klein"])
def test_latents_outside_of_the_mask_are_the_sources(name):
    pipe = flowopt(name, stock_pipeline(name))
    size = picture(name).shape[-2:]
    mask = torch.zeros(1, *size)
    mask[:, : size[0] // 2] = 1.0
    arguments = {"image": picture(name), "num_inference_steps": 3, "strength": 0.7, "guidance_scale": 3.0}
    arguments |= {"num_optimization_steps": 1, "step_size": 0.1, "output_type": "latent"} | edit_call(name)
    free = pipe(**arguments)
    kept = pipe(**arguments, mask_image=mask)
    whole = pipe(**arguments, mask_image=torch.ones(1, *size))
    torch.testing.assert_close(whole.latents, free.latents, rtol=1e-4, atol=1e-5)
    y = next(iter(pipe.stream(**{k: v for k, v in arguments.items() if k != "output_type"}, mask_image=mask)))
    half = (kept.latents - free.latents).abs()
    grid = half if half.ndim == 4 else half.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    middle = grid.shape[2] // 2
    assert grid[:, :, middle:].mean() > 0 and y.latents.shape == kept.latents.shape
    residual = kept.latents - encoded(pipe, name)
    residual = residual if residual.ndim == 4 else residual.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(residual[:, :, middle:], torch.zeros_like(residual[:, :, middle:]), rtol=0, atol=1e-5)
    assert residual[:, :, :middle].abs().mean() > 1e-3


def test_the_masked_path_is_noised_as_the_sampler_is(pipe):
    """With a mask of nothing but one corner the sampler's inputs elsewhere lie on signal y + noise e, with one e."""
    inputs, sigmas = [], []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: inputs.append(
            (kwargs["hidden_states"][-1:], kwargs["timestep"][0] / 1000)
        ),
        with_kwargs=True,
    )
    mask = torch.zeros(1, 16, 16)
    mask[:, :2, :2] = 1.0
    states = pipe.stream(image=picture("sd3"), mask_image=mask, step_size=0.1, **PROMPTS, **RUN)
    first = next(states)
    del inputs[:4]  # Uni-Inv's
    y = first.latents[..., 4:, 4:]
    noise = [((x[..., 4:, 4:] - (1 - s) * y) / s) for x, s in inputs]
    sigmas = [s.item() for _, s in inputs]
    assert len(sigmas) == 3 and sigmas == sorted(sigmas, reverse=True)
    for other in noise[1:]:
        torch.testing.assert_close(other, noise[0], rtol=1e-3, atol=1e-3)


def test_feathering_fades_inwards_alone():
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 40:80, :] = 1.0
    mask[..., 100, 100] = 1.0  # as thin as can be
    blended = feather(torch.ones(1, 3, 128, 128), torch.zeros(1, 3, 128, 128), mask)[0, 0]
    assert torch.equal(blended > 0, mask[0, 0] > 0)
    torch.testing.assert_close(blended[38:44, 64], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))
    assert blended[60, 0] == 1  # the picture's border is no edge of the mask


def test_masks_of_latents():
    from trimtab.pipelines.families import FAMILIES

    families = {family.name: family for family in FAMILIES}
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5, 9] = 1.0
    plain = latent_mask(mask, families["stable-diffusion-3"], (4, 8, 8), 2)
    assert plain.nonzero().tolist() == [[0, 0, 2, 4]]
    tokens = latent_mask(mask, families["flux"], (16, 16), 2)  # 4x4 tokens of 2x2 latents of 4 channels
    assert tokens.shape == (1, 16, 16) and set(tokens.nonzero()[:, 1].tolist()) == {1 * 4 + 2}
    assert tokens.sum() == 4


# ---- precision, traces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceleration", ["none", "anderson", "inverse"])
def test_a_half_precision_model_keeps_a_float32_iterate(acceleration):
    pipe = flowopt("sd3", tiny_pipeline("sd3", dtype=torch.bfloat16))
    seen = []
    states = list(
        pipe.stream(
            image=picture("sd3"), step_size=1e-4, acceleration=acceleration, num_optimization_steps=1, **PROMPTS, **RUN
        )
    )
    for s in states:
        assert s.noise.dtype == s.latents.dtype == torch.float32
        seen.append(s.noise)
    if acceleration == "none":
        moved = (seen[1] - seen[0]).abs()
        assert 0 < moved.max() < 1e-3 and not torch.equal(seen[1], seen[1].bfloat16().float())


def test_nothing_is_left_on_the_pipeline(pipe):
    edit(pipe)  # models install things at their first call
    before = state(pipe)
    edit(pipe, selection=lambda images, prompts: images.mean((1, 2, 3)), mask_image=torch.ones(1, 16, 16))
    pipe.invert(picture("sd3"), "a red cat", num_inference_steps=2, max_sequence_length=16)
    stream = pipe.stream(image=picture("sd3"), **PROMPTS, **RUN)
    next(stream)
    assert not changes(before, state(pipe))  # between two iterates, too
    stream.close()
    assert not changes(before, state(pipe))


def test_offloaded_models_stay_on_the_device_between_passes(pipe, monkeypatch):
    """They come back once when the run ends, not with every iterate."""
    log = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: log.append("free"))
    stream = pipe.stream(image=picture("sd3"), step_size=0.1, num_optimization_steps=2, **PROMPTS, **RUN)
    prepared = len(log)
    for _ in stream:
        log.append("state")
    assert log[prepared:] == ["state"] * 3 + ["free"]


def test_the_call_needs_no_gradient(pipe):
    with torch.enable_grad():
        result = edit(pipe)
        first = next(iter(pipe.stream(image=picture("sd3"), step_size=0.1, **PROMPTS, **RUN)))
    assert not result.latents.requires_grad and not first.latents.requires_grad and not first.images.requires_grad


# ---- schedulers --------------------------------------------------------------------------------------------


def test_samplers_of_other_schedulers():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert sampler_of(flow) is not flow and dict(sampler_of(flow).config) == dict(flow.config)
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.5)
    assert type(sampler_of(heun)) is diffusers.FlowMatchEulerDiscreteScheduler and sampler_of(heun).config.shift == 2.5
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert (
        type(sampler_of(solver)) is diffusers.FlowMatchEulerDiscreteScheduler and sampler_of(solver).config.shift == 3.0
    )
    for cls in (diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler = cls(beta_start=0.001, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction")
        sampler = sampler_of(scheduler)
        assert type(sampler) is diffusers.DDIMScheduler and not sampler.config.clip_sample
        torch.testing.assert_close(sampler.alphas_cumprod, scheduler.alphas_cumprod)
        assert sampler.config.prediction_type == "v_prediction"
    assert type(inverse_of(sampler)).__name__ == "DDIMInverseScheduler"
    assert type(inverse_of(flow)).__name__ == "FlowMatchUniInvScheduler"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "which adds noise"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "with `stochastic_sampling` True"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "with `algorithm_type` 'sde-dpm"),
        ("LCMScheduler", {}, "which adds noise"),
        ("DDPMScheduler", {}, "which adds noise"),
        ("VQDiffusionScheduler", {"num_vec_classes": 8}, "takes one of a flow or of a variance-preserving"),
    ],
)
def test_schedulers_that_are_refused_by_name(pipe, name, config, message):
    pipe.scheduler = getattr(diffusers, name)(**config)
    with pytest.raises(ValueError, match=f"`scheduler` is a {name}.*{message}"):
        edit(pipe)
