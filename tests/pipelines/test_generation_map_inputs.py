"""What a generation map refuses, and what it leaves behind: nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

from tests.pipelines.test_generation_map import PROMPTS, seeded, tiny_map
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, TINY, tiny_pipeline
from trimtab.pipelines import GenerationMap

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


def stochastic() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)


BAD_ARGUMENTS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "`prompt` is an empty list", {"prompt": []}),
    (TypeError, "`prompt`", {"prompt": 3}),
    (TypeError, "`prompt`", {"prompt": ["a cat", None]}),
    (ValueError, "`prompt` is None", {"prompt": None}),
    (ValueError, "`prompt` and `prompt_embeds`", {"prompt_embeds": torch.zeros(1, 4, 32)}),
    (ValueError, "`negative_prompt` is an empty list", {"negative_prompt": []}),
    (ValueError, "`negative_prompt` has 2 strings", {"negative_prompt": ["a", "b"]}),
    (TypeError, "`negative_prompt`", {"negative_prompt": 1.0}),
    (ValueError, "`guidance_scale` is nan", {"guidance_scale": float("nan")}),
    (ValueError, "`guidance_scale` is inf", {"guidance_scale": float("inf")}),
    (ValueError, "`guidance_scale` is -1", {"guidance_scale": -1.0}),
    (TypeError, "`guidance_scale`", {"guidance_scale": "7"}),
    (TypeError, "`guidance_scale`", {"guidance_scale": True}),
    (ValueError, "`num_inference_steps` is 0", {"num_inference_steps": 0}),
    (TypeError, "`num_inference_steps`", {"num_inference_steps": 2.5}),
    (ValueError, "`height` is 18; takes a multiple of 4", {"height": 18, "width": 16}),
    (ValueError, "`width` is -16", {"height": 16, "width": -16}),
    (TypeError, "`width`", {"height": 16, "width": "16"}),
    (ValueError, "`output` is 'pil'", {"output": "pil"}),
    (TypeError, "`generator`", {"generator": 0}),
    (ValueError, "`generator` has 2", {"generator": [seeded(0), seeded(1)]}),
    (ValueError, "`scheduler` has stochastic_sampling", {"scheduler": stochastic()}),
    (TypeError, "`latents` is set by GenerationMap itself", {"latents": None}),
    (TypeError, "`num_images_per_prompt` is set by", {"num_images_per_prompt": 2}),
    (TypeError, "`guidance_scales` is no argument of StableDiffusion3Pipeline", {"guidance_scales": 2}),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_refused_before_any_model_runs(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    pipe = tiny_pipeline("sd3")
    with watched(pipe) as ran, pytest.raises(error, match=message):
        tiny_map("sd3", **{"prompt": "a red cat", "pipe": pipe} | options)
    assert not ran


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="`pipe` is a str, which is in no family.*StableDiffusion3Pipeline"):
        GenerationMap("model", "a cat")
    with pytest.raises(ValueError, match="`use_resolution_binning` is True"):
        tiny_map("pixart-sigma", use_resolution_binning=True)
    with pytest.raises(ValueError, match="`guidance_scale` and `true_cfg_scale` are both given"):
        tiny_map("qwen-image", guidance_scale=2.0)
    with pytest.raises(ValueError, match="`height` is 32, which StableDiffusionPipeline ignores alone"):
        tiny_map("sd15", height=32)


@pytest.fixture(scope="module")
def f() -> GenerationMap:
    return tiny_map("sd3", PROMPTS)


def batch(rows: int = 2, **options: Any) -> torch.Tensor:
    return torch.zeros(rows, 4, 8, 8, **options)


BAD_CALLS: list[tuple[type[Exception], str, Callable[[GenerationMap], Any]]] = [
    (ValueError, r"`latents` has shape \(4, 8, 8\); takes \(B, 4, 8, 8\)", lambda f: f(batch()[0])),
    (ValueError, r"`latents` has shape \(2, 4, 8, 4\)", lambda f: f(batch()[..., :4])),
    (ValueError, r"`latents` has shape \(0, 4, 8, 8\)", lambda f: f(batch(0))),
    (ValueError, "`latents` has a value that is not finite", lambda f: f(batch() / 0)),
    (ValueError, "`latents` has 3 rows for 2 prompts", lambda f: f(batch(3))),
    (TypeError, "`latents` has dtype torch.int64", lambda f: f(batch(dtype=torch.int64))),
    (TypeError, "`latents` is a list", lambda f: f([0.0])),
    (ValueError, "`prompt_index` is", lambda f: f(batch(), prompt_index=[0])),
    (ValueError, "`prompt_index` is", lambda f: f(batch(), prompt_index=[0, 2])),
    (ValueError, "`prompt_index` is", lambda f: f(batch(), prompt_index=[-1, 0])),
    (ValueError, "`latents` has shape", lambda f: f.decode(batch()[..., :4])),
    (TypeError, "`latents` is a NoneType", lambda f: f.decode(None)),
    (ValueError, "`batch` is 0", lambda f: f.sample_latents(0, seeded(0))),
    (TypeError, "`generator` is None", lambda f: f.sample_latents(1, None)),
    (ValueError, "`generator` has 1", lambda f: f.sample_latents(2, [seeded(0)])),
    (ValueError, r"`images` has shape \(1, 3, 8, 8\)", lambda f: f.encode(torch.zeros(1, 3, 8, 8))),
    (ValueError, "`images` has a value that is not in", lambda f: f.encode(torch.full((1, 3, 16, 16), 1.1))),
    (ValueError, "`images` has a value that is not in", lambda f: f.encode(nans())),
    (TypeError, "`images` has dtype torch.uint8", lambda f: f.encode(nans().to(torch.uint8))),
]


def nans() -> torch.Tensor:
    return torch.full((1, 3, 16, 16), float("nan"))


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS)
def test_bad_calls_are_refused_before_any_model_runs(
    f: GenerationMap, error: type[Exception], message: str, call: Callable[[GenerationMap], Any]
) -> None:
    with watched(f.pipe) as ran, pytest.raises(error, match=message):
        call(f)
    assert not ran


@contextmanager
def watched(pipe: Any) -> Iterator[list[str]]:
    """Names of the pipeline's models as they run."""
    ran: list[str] = []
    handles = [
        component.register_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
        for component in pipe.components.values()
        if isinstance(component, torch.nn.Module)
    ]
    yield ran
    for handle in handles:
        handle.remove()


def state(pipe: Any) -> dict[str, Any]:
    """All that a call could leave behind: attributes by identity, flags, hooks, global settings."""
    found: dict[str, Any] = {"pipe": dict(vars(pipe)), "scheduler": dict(vars(pipe.scheduler))}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                found[name, path] = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
                found[name, path, "hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
            for path, parameter in component.named_parameters():
                found[name, path] = (parameter.requires_grad, parameter.grad)
    found["random"] = torch.get_rng_state().tolist()
    found["gradients"] = torch.is_grad_enabled()
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Any]:
    """Where two states differ."""
    absent = object()

    def equal(a: Any, b: Any) -> bool:
        return a is b or (not isinstance(a, torch.Tensor) and a == b)

    found = []
    for key in before.keys() | after.keys():
        old, new = before.get(key, absent), after.get(key, absent)
        if isinstance(old, dict) and isinstance(new, dict):
            names = old.keys() | new.keys()
            found += [(key, name) for name in names if not equal(old.get(name, absent), new.get(name, absent))]
        elif not equal(old, new):
            found.append(key)
    return found


class Stop(Exception):
    pass


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["sd15", "sd3", "qwen-image"])
def test_no_trace_is_left(
    name: str, error: type[BaseException] | None, differentiable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_pipeline(name)
    size = TINY[name].size[0]
    pipe("two dog", num_inference_steps=1, height=size, width=size)  # models install things at their first call
    del pipe._progress_bar_config
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    calls: list[int] = []

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(step)
        if error is not None and len(calls) == 2:
            raise error
        return tensors

    before = state(pipe)
    f = tiny_map(name, pipe=pipe, scheduler=scheduler, callback_on_step_end=step_end)
    assert not changes(before, state(pipe))
    z = f.sample_latents(1, seeded(0)).requires_grad_(differentiable)
    assert not changes(before, state(pipe))
    if error is None:
        images = f(z)
        if differentiable:
            images.sum().backward()
    else:
        with pytest.raises(error):
            f(z)
    assert len(calls) >= 2
    assert not changes(before, state(pipe))
    assert not vars(scheduler).get("num_inference_steps")
    assert capsys.readouterr() == ("", "")


def test_a_trace_would_be_seen() -> None:
    pipe = tiny_pipeline("sd3")
    pipe("a red cat", num_inference_steps=1)
    before = state(pipe)
    pipe("a red cat", num_inference_steps=2, guidance_scale=2.0)
    pipe.transformer.requires_grad_(False)
    pipe.vae.decoder.mark = 1
    seen = changes(before, state(pipe))
    assert ("scheduler", "num_inference_steps") in seen
    assert ("pipe", "_guidance_scale") in seen
    assert (("vae", "decoder"), "mark") in seen
    assert ("transformer", "proj_out.weight") in seen
    assert "random" in seen


def test_a_failing_preparation_leaves_no_trace() -> None:
    pipe = tiny_pipeline("sd3")
    before = state(pipe)
    with pytest.raises(ValueError, match="max_sequence_length"):
        tiny_map("sd3", pipe=pipe, max_sequence_length=10_000)
    assert not changes(before, state(pipe))


def test_two_maps_of_one_pipeline_do_not_disturb_each_other() -> None:
    pipe = tiny_pipeline("sd3")
    first, second = (tiny_map("sd3", prompt, pipe=pipe) for prompt in PROMPTS)
    z = first.sample_latents(1, seeded(0))
    alone = first(z), second(z)
    graph = first(z.clone().requires_grad_())
    assert torch.equal(second(z), alone[1])
    graph.sum().backward()  # computes the steps again, after the other map has run
    assert torch.equal(first(z), alone[0])
    inner: list[torch.Tensor] = []

    def nested(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(second(z))
        return tensors

    outer = tiny_map("sd3", PROMPTS[0], pipe=pipe, callback_on_step_end=nested)
    assert torch.equal(outer(z), alone[0])
    assert all(torch.equal(images, alone[1]) for images in inner)
