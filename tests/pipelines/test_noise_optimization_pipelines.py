"""Noise optimization in every family: the real classes with tiny random weights."""

import inspect
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import trimtab.pipelines
from tests.pipelines.few_step_pipelines import FEW_STEP
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.pipelines import GenerationMap, NoiseOptimizationPipeline
from trimtab.pipelines.noise_optimization import NoiseOptimizationPipelineMixin
from trimtab.pipelines.noise_presets import NOISE_PRESETS
from trimtab.pipelines.noise_task import adds_noise
from trimtab.rewards import CallableReward, RewardModel, WeightedReward

pytestmark = pytest.mark.filterwarnings(
    NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated", "ignore:.*upcast_vae.*:FutureWarning"
)
FOLDER = Path(trimtab.pipelines.__file__).parent
CALL = {"num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 16, "output_type": "pt"}


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


RED = CallableReward(redness, differentiable=True)
BLUE = CallableReward(lambda images, prompts: images[:, 2].mean((1, 2)), True, name="blue")


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def sd3():
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=FEW_STEP)
def case(request):
    """(case, stock pipeline, the noise-optimizing one of the same components)"""
    case = FEW_STEP[request.param]
    stock = case.build()
    pipe = NoiseOptimizationPipeline.from_pipe(stock, reward=RED)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(stock, "default_sample_size"):
        pipe.default_sample_size = stock.default_sample_size
    return case, stock, pipe


def state_of(pipe):
    """What a call must leave as it was."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    flags = {
        name: [getattr(part, "gradient_checkpointing", None) for part in module.modules()]
        for name, module in modules.items()
    }
    needs = {name: [(p.requires_grad, p.grad is None) for p in module.parameters()] for name, module in modules.items()}
    attributes = {key for key in vars(pipe) if key not in ("_interrupt", "_guidance_scale")}
    return flags, needs, attributes, type(pipe.scheduler), dict(pipe.scheduler.config)


# ---- every family ------------------------------------------------------------------------------------------


def test_it_starts_at_the_stock_picture_and_gets_better(case):
    case, stock, pipe = case
    before = state_of(pipe)
    told = {} if case.prompt else {"reward_prompt": "a red cat"}
    generator = torch.Generator().manual_seed(0)
    out = pipe(case.prompt, num_optimization_steps=6, generator=generator, output_type="pt", **case.call, **told)
    assert state_of(pipe) == before
    assert out.rewards.shape == (6, 1) and out.best_step.shape == (1,) and out.num_evaluations == 6
    assert (out.rewards.max(0).values > out.rewards[0]).all()
    torch.testing.assert_close(redness(out.images, None), out.rewards.max(0).values)
    torch.testing.assert_close(redness(out.initial_images, None), out.rewards[0])
    f = GenerationMap(stock, case.prompt, **case.call)
    assert out.latents.shape == (1, *f.latent_shape) and out.latents.dtype == torch.float32
    arguments = {**case.call, "output_type": "pt", "return_dict": False}
    prompt = {"prompt": case.prompt} if case.prompt else {}
    if not adds_noise(stock.scheduler, len(case.call.get("timesteps", [])) or case.call["num_inference_steps"]):
        first = stock(**prompt, **arguments, generator=torch.Generator().manual_seed(0))[0]
        assert torch.equal(out.initial_images, first)
        again = stock(**prompt, **arguments, latents=out.latents)[0]
        assert torch.equal(out.images, again)


def test_classes_and_files_are_one_for_each_family(case):
    case, stock, pipe = case
    name = f"NoiseOptimization{type(stock).__name__}"
    assert type(pipe).__name__ == name and isinstance(pipe, type(stock))
    assert issubclass(type(pipe), NoiseOptimizationPipelineMixin)
    assert all(pipe.components[part] is component for part, component in stock.components.items())
    assert inspect.signature(type(pipe).__init__) == inspect.signature(type(stock).__init__)
    assert (name in trimtab.pipelines._NOISE_OPTIMIZATION) == (case.file is not None)
    if case.file is not None:
        assert type(pipe) is getattr(trimtab.pipelines, name)
        assert type(pipe).__module__ == f"trimtab.pipelines.{case.file}"


def test_every_file_has_a_row():
    assert set(trimtab.pipelines._NOISE_OPTIMIZATION.values()) == {c.file for c in FEW_STEP.values() if c.file}


@pytest.mark.parametrize("name", ["sd3.5-turbo", "sd-turbo"])
def test_custom_pipeline_files_load_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    case = FEW_STEP[name]
    stock = case.build()
    stock.save_pretrained(tmp_path / "model")
    missing = {key: None for key in ("safety_checker", "feature_extractor") if key in stock.components}
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "model",
        custom_pipeline=str(FOLDER / f"{case.file}.py"),
        trust_remote_code=True,
        dtype=torch.float32,
        **missing,
    )
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, NoiseOptimizationPipelineMixin)
    out = pipe(case.prompt, reward=RED, num_optimization_steps=2, generator=seeds(0), **case.call)
    assert isinstance(out.images[0], Image.Image)
    loaded = NoiseOptimizationPipeline.from_pretrained(tmp_path / "model", reward=RED, dtype=torch.float32, **missing)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(case.prompt, num_optimization_steps=2, generator=seeds(0), **case.call)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(out.images[0]))


# ---- the call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"preset": "paper"}, {"optimizer": "best-of-n"}, {"gradient": "jacobian-free"}]
)
def test_a_batch_of_four_is_four_single_runs(sd3, options):
    prompts = ["a red cat", "two dog", "a blue house", "a star"]
    options = {**CALL, **options, "num_optimization_steps": 4}
    together = sd3(prompts, generator=seeds(0, 1, 2, 3), **options)
    parts = sd3(prompts, generator=seeds(0, 1, 2, 3), batch_size=3, **options)
    torch.testing.assert_close(parts.images, together.images, rtol=0, atol=1e-5)
    for row, prompt in enumerate(prompts):
        alone = sd3(prompt, generator=seeds(row), **options)
        torch.testing.assert_close(together.images[row], alone.images[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.rewards[:, row], alone.rewards[:, 0], rtol=0, atol=1e-5)
        assert together.best_step[row] == alone.best_step[0]


@pytest.mark.parametrize("name", ["sdxl-turbo", "sd3.5-turbo", "sana-sprint"])
@pytest.mark.parametrize("optimizer", ["gradient", "best-of-n"])
def test_two_runs_with_one_generator_are_identical(name, optimizer):
    """Where the sampler adds noise, too: the same at every iteration, and none that the first noise is made of."""
    case = FEW_STEP[name]
    pipe = NoiseOptimizationPipeline.from_pipe(case.build(), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    call = {**case.call, "num_optimization_steps": 3, "optimizer": optimizer, "output_type": "pt"}
    first, again, other = (pipe(case.prompt, generator=torch.Generator().manual_seed(s), **call) for s in (0, 0, 1))
    assert torch.equal(first.images, again.images) and torch.equal(first.rewards, again.rewards)
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.initial_images, other.initial_images)
    from_latents = pipe(
        case.prompt,
        latents=first.latents,
        generator=torch.Generator().manual_seed(0),
        **call | {"num_optimization_steps": 1},
    )
    torch.testing.assert_close(from_latents.images, first.images, rtol=0, atol=1e-6)


def test_samples_of_a_prompt_and_what_rewards_are_told(sd3):
    seen = []

    def reward(images, prompts):
        seen.append(prompts)
        return redness(images, prompts)

    told = CallableReward(reward, differentiable=True)
    options = {**CALL, "reward": told, "num_optimization_steps": 1}
    out = sd3(["a cat", "a dog"], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **options)
    assert seen.pop() == ["a cat", "a cat", "a dog", "a dog"] and len(out.images) == 4
    alone = sd3("a dog", generator=seeds(2), **options)
    torch.testing.assert_close(alone.images[0], out.images[2], rtol=0, atol=1e-5)
    sd3(["a cat", "a dog"], generator=seeds(0, 1), reward_prompt="a fox", **options)
    assert seen.pop() == ["a fox"] * 2
    sd3(["a cat", "a dog"], generator=seeds(0, 1), reward_prompt=["a fox", "a key"], **options)
    assert seen.pop() == ["a fox", "a key"]
    latents = torch.randn(3, *out.latents.shape[1:])
    assert len(sd3("a cat", latents=latents, **options).images) == 3
    plain = sd3("a cat", latents=latents[:1], **options).images
    negative = sd3("a cat", latents=latents[:1], negative_prompt="bad quality", **options).images
    assert not torch.equal(plain, negative)


def test_output_types(sd3):
    options = {**CALL, "num_optimization_steps": 2}
    made = {
        kind: sd3("a cat", generator=seeds(0), **options | {"output_type": kind})
        for kind in ("pt", "np", "pil", "latent")
    }
    assert np.array_equal(made["np"].images, made["pt"].images.movedim(1, -1).numpy())
    assert np.array_equal(np.asarray(made["pil"].images[0]), (made["np"].images[0] * 255).round().astype(np.uint8))
    assert torch.equal(made["latent"].images, made["pt"].latents)
    assert isinstance(made["pil"].initial_images[0], Image.Image)
    as_tuple = sd3("a cat", generator=seeds(0), return_dict=False, **options)
    assert torch.equal(as_tuple[0], made["pt"].images) and torch.equal(as_tuple[1], made["pt"].rewards)


def test_states_come_one_by_one_and_a_callback_can_stop(sd3):
    options = {key: value for key, value in CALL.items() if key != "output_type"}
    out = sd3("a cat", generator=seeds(0), num_optimization_steps=4, **CALL)
    states = list(sd3.stream("a cat", generator=seeds(0), num_optimization_steps=4, **options))
    assert [state.step for state in states] == [0, 1, 2, 3]
    assert torch.equal(torch.stack([state.rewards for state in states]), out.rewards)
    assert torch.equal(states[-1].best_images, out.images)
    assert torch.equal(torch.stack([state.norms for state in states]), out.norms)
    seen = []

    def callback(pipe, step, state):
        seen.append((pipe, step, state.step))
        return step == 2

    stopped = sd3("a cat", generator=seeds(0), num_optimization_steps=4, callback_on_iteration_end=callback, **CALL)
    assert seen == [(sd3, step, step) for step in range(3)]
    assert torch.equal(stopped.rewards, out.rewards[:3]) and not stopped.interrupted
    with pytest.raises(TypeError, match="`output_type` is an argument of the call"):
        sd3.stream("a cat", output_type="pt")


def test_terms_and_the_held_out_reward_are_reported(sd3):
    reward = WeightedReward([(RED, 2.0), (BLUE, -0.5)])
    out = sd3("a cat", reward=reward, monitor=BLUE, generator=seeds(0), num_optimization_steps=3, **CALL)
    assert list(out.terms) == ["redness", "blue"]
    torch.testing.assert_close(out.rewards, 2 * out.terms["redness"] - 0.5 * out.terms["blue"])
    torch.testing.assert_close(out.monitor, out.terms["blue"])
    watched = CallableReward(lambda images, prompts: [-1.0] * len(images), name="flat")
    out = sd3("a cat", monitor=watched, monitor_patience=2, generator=seeds(0), num_optimization_steps=9, **CALL)
    assert out.rewards.shape == (3, 1) and "has not risen since iteration 0" in out.stopped[0]
    assert out.best_step.item() == 0 and torch.equal(out.images, out.initial_images)


def test_gradient_free_rewards_go_with_best_of_n(sd3):
    reward = CallableReward(lambda images, prompts: images[:, 0].mean((1, 2)).tolist(), name="listed")
    out = sd3("a cat", reward=reward, optimizer="best-of-n", generator=seeds(0), num_optimization_steps=5, **CALL)
    generator = torch.Generator().manual_seed(0)
    f = GenerationMap(sd3, "a cat", **{key: value for key, value in CALL.items() if key != "output_type"})
    with torch.no_grad():
        values = torch.cat([f(f.sample_latents(1, [generator]))[:, 0].mean((1, 2)) for _ in range(5)])
    torch.testing.assert_close(out.rewards[:, 0], values)
    assert out.best_step.item() == values.argmax()


def test_a_many_step_model_gets_the_noise(sd3):
    options = {**CALL, "generator": seeds(0), "num_optimization_steps": 2}
    more = {"num_inference_steps": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    many = tiny_pipeline("sd3")
    out = sd3("a cat", multi_step_pipe=many, multi_step_kwargs=more, **options)
    assert torch.equal(out.multi_step_images, many("a cat", latents=out.latents, output_type="pt", **more).images)
    with pytest.raises(ValueError, match=r"`multi_step_pipe` takes noise of shape \(16, 16\)"):
        sd3("a cat", multi_step_pipe=flux_of_that_size(), multi_step_kwargs={"max_sequence_length": 16}, **options)


def flux_of_that_size():
    pipe = tiny_pipeline("flux")
    pipe.default_sample_size = 8
    return pipe


def test_the_stock_call_is_still_there(sd3):
    stock = tiny_pipeline("sd3")
    made = sd3.generate("a cat", generator=torch.Generator().manual_seed(0), **CALL).images
    assert torch.equal(made, stock("a cat", generator=torch.Generator().manual_seed(0), **CALL).images)
    assert type(stock).from_pipe(sd3, dtype=torch.float32).transformer is sd3.transformer


def test_half_precision_models_have_float32_noise():
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3", dtype=torch.bfloat16), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a cat", generator=seeds(0), num_optimization_steps=4, **CALL)
    assert pipe.transformer.dtype == torch.bfloat16
    assert out.latents.dtype == torch.float32 and not torch.equal(out.latents, out.latents.bfloat16().float())
    assert torch.isfinite(out.rewards).all()


@pytest.mark.parametrize("name", ["sd3.5-turbo", "sd-turbo"])
def test_checkpointing_keeps_less_and_changes_nothing(name):
    case = FEW_STEP[name]
    pipe = NoiseOptimizationPipeline.from_pipe(case.build(), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    kept, results = [], []
    for checkpointing in (True, False):
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(
                pipe(
                    case.prompt,
                    num_optimization_steps=2,
                    generator=seeds(0),
                    gradient_checkpointing=checkpointing,
                    output_type="pt",
                    **case.call,
                )
            )
        kept.append(count[0])
    assert torch.equal(results[0].rewards, results[1].rewards)
    assert kept[0] < 0.5 * kept[1]


def test_checkpointing_of_the_users_own_is_honoured():
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_optimization_steps": 3, **CALL}
    expected = pipe("a cat", generator=seeds(0), **options)
    pipe.vae.enable_gradient_checkpointing()
    pipe.transformer.enable_gradient_checkpointing()
    pipe.vae.enable_slicing()
    before = state_of(pipe)
    torch.testing.assert_close(pipe("a cat", generator=seeds(0), **options).images, expected.images)
    assert state_of(pipe) == before and pipe.vae.is_gradient_checkpointing


def test_jacobian_free_gradients_record_no_denoiser(sd3):
    recorded = []
    hook = sd3.transformer.register_forward_hook(lambda module, args, output: recorded.append(output[0].requires_grad))
    sd3("a cat", gradient="jacobian-free", generator=seeds(0), num_optimization_steps=3, **CALL)
    assert recorded and not any(recorded)
    recorded.clear()
    sd3("a cat", generator=seeds(0), num_optimization_steps=3, **CALL)
    assert any(recorded)
    hook.remove()


# ---- what goes wrong ---------------------------------------------------------------------------------------


def broken_at(step, error=None):
    count = iter(range(1000))

    def reward(images, prompts):
        values = redness(images, prompts)
        if next(count) < step:
            return values
        if error is not None:
            raise error
        return values * math.nan

    return CallableReward(reward, differentiable=True)


def test_a_nan_at_iteration_7_returns_the_best_of_the_first_7(sd3):
    healthy = sd3("a cat", generator=seeds(0), num_optimization_steps=7, **CALL)
    with pytest.warns(RuntimeWarning, match="sample 0: the reward at iteration 7 is not finite"):
        out = sd3("a cat", reward=broken_at(7), generator=seeds(0), num_optimization_steps=20, **CALL)
    assert out.rewards.shape == (8, 1) and out.rewards[7].isnan().all()
    assert out.stopped == ["the reward at iteration 7 is not finite"]
    # With 7 iterations the last is no different: only its gradient isn't taken.
    torch.testing.assert_close(out.images, healthy.images, rtol=0, atol=1e-6)
    assert torch.equal(out.best_step, healthy.best_step)


def test_an_interrupt_returns_the_best_so_far(sd3):
    before = state_of(sd3)
    healthy = sd3("a cat", generator=seeds(0), num_optimization_steps=3, **CALL)
    stop = broken_at(3, KeyboardInterrupt())
    out = sd3("a cat", reward=stop, generator=seeds(0), num_optimization_steps=20, **CALL)
    assert out.interrupted and out.rewards.shape == (3, 1)
    torch.testing.assert_close(out.images, healthy.images, rtol=0, atol=1e-6)
    with pytest.raises(KeyboardInterrupt):  # nothing is there yet
        sd3("a cat", reward=broken_at(0, KeyboardInterrupt()), generator=seeds(0), **CALL)
    assert state_of(sd3) == before


def test_an_error_leaves_the_pipeline_as_it_was(sd3):
    before = state_of(sd3)
    with pytest.raises(RuntimeError, match="out of order"):
        sd3("a cat", reward=broken_at(1, RuntimeError("out of order")), generator=seeds(0), **CALL)
    assert state_of(sd3) == before


BAD = {
    "no reward": ({"reward": 3}, TypeError, "`reward` is a int"),
    "a function": ({"reward": redness}, TypeError, "wrap a function in trimtab.rewards.CallableReward"),
    "an unknown reward": ({"reward": "hps"}, ValueError, "takes bundled, right-share, clip"),
    "no weight": ({"reward": {"bundled": 0.0}}, ValueError, "at least one > 0"),
    "no gradient": (
        {"reward": CallableReward(redness)},
        ValueError,
        "isn't differentiable and `optimizer` needs a gradient; takes a differentiable reward, or an optimizer that "
        'needs none, such as "best-of-n"',
    ),
    "another reward's shape": (
        {"reward": CallableReward(lambda images, prompts: images.mean((2, 3)), True, name="odd")},
        ValueError,
        r"reward 'odd' returned shape \(1, 3\); takes a tensor of shape \(1,\)",
    ),
    "no steps": ({"num_optimization_steps": 0}, ValueError, "`num_optimization_steps` is 0"),
    "half a step": ({"num_optimization_steps": 1.5}, TypeError, "`num_optimization_steps` is a float"),
    "an unknown optimizer": ({"optimizer": "newton"}, ValueError, "`optimizer` is 'newton'"),
    "an unknown gradient": ({"gradient": "half"}, ValueError, "`gradient` is 'half'; takes 'full' or 'jacobian-free'"),
    "an unknown preset": (
        {"preset": "papers"},
        ValueError,
        "`preset` is 'papers'; takes one of default, sphere, paper",
    ),
    "an unknown setting": ({"optimizer_kwargs": {"speed": 3}}, TypeError, "speed"),
    "noise of another shape": ({"latents": torch.randn(1, 4, 4, 4)}, ValueError, r"takes \(B, 4, 8, 8\)"),
    "noise of another number": (
        {"latents": torch.randn(3, 4, 8, 8), "prompt": ["a cat", "a dog"]},
        ValueError,
        "`latents` has 3 rows for 2 samples",
    ),
    "noise of integers": ({"latents": torch.ones(1, 4, 8, 8, dtype=torch.int)}, TypeError, "`latents` has dtype"),
    "NaN in the noise": ({"latents": torch.full((1, 4, 8, 8), math.nan)}, ValueError, "not finite"),
    "generators of another number": ({"generator": seeds(0, 1)}, ValueError, "takes one or a list of 1"),
    "no generator": ({"generator": 0}, TypeError, "`generator` is 0"),
    "no prompt": ({"prompt": None}, ValueError, "`prompt` is None"),
    "an empty list": ({"prompt": []}, TypeError, r"`prompt` is \[\]"),
    "prompts of another number": ({"reward_prompt": ["a", "b"]}, ValueError, "`reward_prompt` has 2 strings"),
    "no text": ({"reward_prompt": [1]}, TypeError, "`reward_prompt` is"),
    "an unknown output": ({"output_type": "jpg"}, ValueError, "`output_type` is 'jpg'"),
    "an unknown argument": ({"colour": "red"}, TypeError, "`colour` is no argument of"),
    "patience alone": ({"monitor_patience": 3}, ValueError, "without a `monitor`"),
    "no patience": ({"monitor_patience": 0, "monitor": BLUE}, ValueError, "`monitor_patience` is 0"),
    "no batch": ({"batch_size": 0}, ValueError, "`batch_size` is 0"),
    "an odd size": ({"height": 15}, ValueError, "`height` is 15"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_runs(name, sd3, monkeypatch):
    options, error, words = BAD[name]
    ran = []
    hook = sd3.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=words):
        sd3(**{"prompt": "a cat", "generator": seeds(0), **CALL, **options})
    hook.remove()
    assert name == "another reward's shape" or not ran


def test_a_pipeline_without_a_reward_says_so():
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"))
    with pytest.raises(ValueError, match="`reward` is None and the pipeline has none"):
        pipe("a cat", **CALL)


def test_a_sampler_that_adds_noise_needs_a_generator():
    case = FEW_STEP["sdxl-turbo"]
    pipe = NoiseOptimizationPipeline.from_pipe(case.build(), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="`generator` is None and EulerAncestralDiscreteScheduler adds noise"):
        pipe(case.prompt, **case.call)
    one = {**case.call, "num_inference_steps": 1, "num_optimization_steps": 1}
    assert len(pipe(case.prompt, **one).images) == 1  # its last step adds none


@pytest.mark.parametrize(
    ("name", "options", "steps", "noisy"),
    [
        ("DDIMScheduler", {}, 4, False),
        ("EulerDiscreteScheduler", {}, 4, False),
        ("EulerAncestralDiscreteScheduler", {}, 4, True),
        ("DDPMScheduler", {}, 4, True),
        ("LCMScheduler", {}, 4, True),
        ("LCMScheduler", {}, 1, False),
        ("SCMScheduler", {}, 2, True),
        ("SCMScheduler", {}, 1, False),
        ("DPMSolverMultistepScheduler", {}, 4, False),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 4, True),
        ("FlowMatchEulerDiscreteScheduler", {}, 4, False),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 4, False),
    ],
)
def test_schedulers_that_add_noise_are_known(name, options, steps, noisy):
    scheduler = getattr(diffusers, name)(**options)
    timesteps = scheduler.timesteps
    assert adds_noise(scheduler, steps) == noisy
    assert scheduler.timesteps is timesteps  # a copy was tried


def test_models_of_videos_are_refused():
    from tests.more_tiny_pipelines import guided_pipeline

    pipe = NoiseOptimizationPipeline.from_pipe(guided_pipeline("wan"), reward=RED)
    with pytest.raises(ValueError, match="which makes videos; takes a model of pictures"):
        pipe("a cat")


# ---- presets -----------------------------------------------------------------------------------------------


def test_presets_call_their_models_as_the_paper_does():
    case = FEW_STEP["hyper-sdxl"]
    pipe = NoiseOptimizationPipeline.from_pipe(case.build(), reward=RED)
    pipe.set_progress_bar_config(disable=True)
    ours = {"num_optimization_steps": 3, "output_type": "pt"}
    preset = pipe("a cat", preset="paper-hyper-sdxl", generator=seeds(0), **ours)
    settings = {**NOISE_PRESETS["paper"].optimizer, "lr": 10.0}
    by_hand = pipe("a cat", optimizer_kwargs=settings, timesteps=[800], guidance_scale=0.0, generator=seeds(0), **ours)
    assert torch.equal(preset.images, by_hand.images)
    slower = pipe("a cat", preset="paper-hyper-sdxl", optimizer_kwargs={"lr": 5.0}, generator=seeds(0), **ours)
    assert not torch.equal(slower.rewards, preset.rewards)


def test_rewards_may_be_given_by_name(sd3):
    class Named(RewardModel):
        name = "named"

        def score(self, images, prompts):
            return redness(images, prompts)

    out = sd3("a cat", reward=Named(), generator=seeds(0), num_optimization_steps=2, **CALL)
    assert list(out.terms) == ["named"]
    bundled = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward="bundled")
    assert bundled.reward.name == "bundled"
    weighted = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward={"bundled": 2.0})
    assert weighted.reward.weights == {"bundled": 2.0}
