"""What stays behind of a call: nothing, also where a callback raises, and no more after 500 calls than after 50."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.geometry import PointCloudAutoencoder, PointCloudReconstructionPipeline
from trimtab.guidance import attach, make_guider
from trimtab.pipelines import (
    EditPipeline,
    FlowOptPipeline,
    GuidedStableDiffusion3Pipeline,
    NoiseOptimizationPipeline,
    RestorationPipeline,
    ShiftedSensor,
)
from trimtab.rewards import CallableReward

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

STOCK = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "pt", "max_sequence_length": 8}
EDIT = {
    "prompt": "a dog",
    "source_prompt": "a cat",
    "num_inference_steps": 3,
    "output_type": "pt",
    "max_sequence_length": 8,
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
Call = Callable[..., torch.Tensor]


class Raised(Exception):
    """What the callbacks of this file raise."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided(stock: Any, rule: str) -> Call:
    def call(callback_on_step_end: Any = None) -> torch.Tensor:
        with attach(stock, make_guider(rule, 3.0)):
            options = {"guidance_scale": 3.0, "generator": seeded(), "callback_on_step_end": callback_on_step_end}
            return stock(**STOCK, **options).images

    return call


def optimized(stock: Any, **options: Any) -> Call:
    def red(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        if red.watched is not None:
            red.watched()
        return images[:, 0].mean((1, 2))

    pipe = quiet(NoiseOptimizationPipeline.from_pipe(stock, reward=CallableReward(red, True)))

    def call(reward: Any = None, **callbacks: Any) -> torch.Tensor:
        red.watched = reward
        return pipe(**STOCK, num_optimization_steps=2, generator=seeded(), **options, **callbacks).images

    return call


def flowopt(stock: Any) -> Call:
    pipe = quiet(FlowOptPipeline.from_pipe(stock))

    def call(selection: Any = "last", **callbacks: Any) -> torch.Tensor:
        return pipe(PICTURE, num_optimization_steps=2, selection=selection, **EDIT, **callbacks).images

    return call


def inverted(stock: Any) -> Call:
    pipe = quiet(FlowOptPipeline.from_pipe(stock))
    options = {name: value for name, value in STOCK.items() if name != "output_type"}
    return lambda **callbacks: pipe.invert(PICTURE, num_optimization_steps=2, **options, **callbacks).latents


def streamed(stock: Any) -> Call:
    """Left after its first state."""
    pipe = quiet(FlowOptPipeline.from_pipe(stock))
    options = {name: value for name, value in EDIT.items() if name != "output_type"}
    return lambda: next(iter(pipe.stream(PICTURE, num_optimization_steps=2, **options))).images


def edited(stock: Any, method: str) -> Call:
    pipe = EditPipeline.from_pipe(stock, method=method)
    return lambda **callbacks: pipe(PICTURE, generator=seeded(), strength=1.0, **EDIT, **callbacks).images


def restored(stock: Any) -> Call:
    pipe = quiet(RestorationPipeline.from_pipe(stock))
    sensor = ShiftedSensor([(0, 0), (1, 2)], torch.ones(2, 16, 16))
    y = sensor.forward(torch.rand(3, 16, 16, generator=seeded()))
    return lambda **callbacks: pipe(y, sensor, generator=seeded(), **STOCK, **callbacks).images


def reconstructed(stock: Any) -> Call:
    torch.manual_seed(0)
    shape = {"num_points": 24, "latent_dim": 4, "encoder_channels": (8,), "decoder_channels": (8,)}
    pipe = PointCloudReconstructionPipeline(PointCloudAutoencoder(**shape).eval())
    cloud = torch.randn(30, 3, generator=seeded())
    return lambda: pipe(cloud).clouds


def of_guided_class(stock: Any) -> Call:
    pipe = quiet(GuidedStableDiffusion3Pipeline.from_pipe(stock))
    return lambda **callbacks: pipe(**STOCK, guidance_scale=3.0, generator=seeded(), **callbacks).images


AT_STEPS, AT_ITERATIONS, ESTIMATE = "callback_on_step_end", "callback_on_iteration_end", "callback_on_estimate"
CASES: dict[str, tuple[Callable[[Any], Call], list[str]]] = {
    "attach apg": (lambda stock: guided(stock, "apg"), [AT_STEPS]),
    "attach slg": (lambda stock: guided(stock, "slg"), [AT_STEPS]),
    "guided class": (of_guided_class, [AT_STEPS]),
    "optimize": (optimized, [AT_ITERATIONS, "reward"]),
    "optimize jacobian-free": (lambda stock: optimized(stock, gradient="jacobian-free"), [AT_ITERATIONS, "reward"]),
    "optimize consensus": (lambda stock: optimized(stock, optimizer="consensus"), [AT_ITERATIONS, "reward"]),
    "flowopt": (flowopt, [AT_ITERATIONS, "selection", AT_STEPS]),
    "invert": (inverted, [AT_ITERATIONS, AT_STEPS]),
    "stream": (streamed, []),
    "edit flowedit": (lambda stock: edited(stock, "flowedit"), [ESTIMATE, AT_STEPS]),
    "edit rf-inversion": (lambda stock: edited(stock, "rf-inversion"), [ESTIMATE, AT_STEPS]),
    "edit sdedit": (lambda stock: edited(stock, "sdedit"), [AT_STEPS]),
    "restore": (restored, [AT_ITERATIONS, AT_STEPS]),
    "reconstruct": (reconstructed, []),
}


@pytest.fixture
def stock() -> Any:
    pipe = quiet(tiny_pipeline("sd3"))
    pipe(**STOCK, generator=seeded())  # transformers' text encoders keep hooks of their own from their first call on
    return pipe


def traces(pipe: Any) -> dict[str, Any]:
    """What a call might leave on a pipeline, its parts, and in torch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: dict[str, Any] = {"scheduler": id(pipe.scheduler), "config": dict(pipe.scheduler.config)}
    found["set on it"] = {name for name in vars(pipe.scheduler) if callable(vars(pipe.scheduler)[name])}
    found["torch"] = (torch.is_grad_enabled(), torch.get_rng_state().sum().item(), torch.get_default_dtype())
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[f"{name} grad"] = [parameter.requires_grad for parameter in part.parameters()]
            found[f"{name} gradients"] = any(parameter.grad is not None for parameter in part.parameters())
            for path, module in part.named_modules():
                kept = [len(getattr(module, hook)) for hook in hooks]
                own = {key for key, value in vars(module).items() if callable(value)}
                own -= {"_gradient_checkpointing_func"}  # Diffusers leaves it, and it does nothing without the flag
                flags = module.training, getattr(module, "gradient_checkpointing", False)
                found[f"{name}.{path}"] = (kept, own, flags, type(getattr(module, "processor", None)))
    return found


def raising(at: int) -> Callable[..., Any]:
    """Lets so many calls pass."""
    calls = []

    def callback(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > at:
            raise Raised
        last = given[-1] if given else None
        return last if isinstance(last, dict) else None  # of a stock pipeline's step the tensors

    return callback


@pytest.mark.parametrize("name", CASES)
def test_nothing_stays_behind(name, stock):
    """After a call, and after one that each of its callbacks ended, at once or later: the next gives the same."""
    make, callbacks = CASES[name]
    call = make(stock)
    before = traces(stock)
    expected = call()
    assert traces(stock) == before
    for callback in callbacks:
        for at in (0, 1) if callback != "selection" else (0,):
            with pytest.raises(Raised):
                call(**{callback: raising(at)})
            assert traces(stock) == before, (callback, at)
            assert torch.is_grad_enabled() and torch.equal(call(), expected), (callback, at)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_five_hundred_calls(name, stock):
    """Memory and objects after 500 calls, of which every tenth is ended by a callback, are those after 50."""
    make, callbacks = CASES[name]
    call = make(stock)
    before, expected, seen = traces(stock), call(), {}
    for number in range(1, 501):
        if callbacks and number % 10 == 0:
            with pytest.raises(Raised):
                call(**{callbacks[number // 10 % len(callbacks)]: raising(0)})
        else:
            assert torch.equal(call(), expected)
        if number in (50, 500):
            gc.collect()
            seen[number] = resident(), len(gc.get_objects())
    assert traces(stock) == before
    (memory, objects), (memory_after, objects_after) = seen[50], seen[500]
    assert memory_after <= 1.05 * memory, f"{memory_after / memory:.3f} times the memory"
    assert objects_after <= 1.005 * objects, f"{objects_after - objects} objects more"
