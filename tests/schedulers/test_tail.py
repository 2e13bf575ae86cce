"""The tail of a schedule: what a stock pipeline makes of the latents that its own run had at that step."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.schedulers import FlowMatchEulerInverseScheduler, start_at

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")

STEPS = 5


def run(pipe: Any, name: str, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last latents of a stock call, and those after each step."""
    after: list[torch.Tensor] = []

    def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after.append(tensors["latents"].clone())
        return tensors

    options = {"num_inference_steps": STEPS, "callback_on_step_end": step_end} | options
    size = {"height": 16, "width": 16} if name == "lumina-2" else {}
    return pipe(**(GUIDED[name].call([0, 1]) | size | options), output_type="latent", return_dict=False)[0], after


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "sana", "z-image", "sd15", "sdxl"])
def test_is_the_rest_of_the_stock_run(name: str) -> None:
    pipe = guided_pipeline(name)
    if name in ("sd15", "sdxl"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    whole, after = run(pipe, name, generator=torch.Generator().manual_seed(0))
    pipe.scheduler = start_at(pipe.scheduler, 2)
    rest, after_rest = run(pipe, name, latents=after[1])
    assert len(after_rest) == STEPS - 2
    assert torch.equal(rest, whole)


def test_of_order_two() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    tail = start_at(scheduler, 2)
    tail.set_timesteps(STEPS)
    scheduler.set_timesteps(STEPS)
    x = torch.tensor([1.0, -2.0])
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.cos(x * t / 1000), t, x, return_dict=False)[0]
        states.append(x)
    x = states[3]
    tail.set_begin_index(0)
    for t in tail.timesteps:
        x = tail.step(torch.cos(x * t / 1000), t, x, return_dict=False)[0]
    assert torch.equal(x, states[-1])


@pytest.mark.parametrize("kind", [FlowMatchEulerInverseScheduler, diffusers.DDIMInverseScheduler])
def test_of_an_inverse_ends_there(kind: type) -> None:
    scheduler, tail = kind(), start_at(kind(), 2)
    scheduler.set_timesteps(STEPS)
    tail.set_timesteps(STEPS)
    assert torch.equal(tail.timesteps, scheduler.timesteps[:3])
    if kind is FlowMatchEulerInverseScheduler:
        assert torch.equal(tail.sigmas, scheduler.sigmas[:4])


def test_leaves_the_scheduler_and_is_cut_anew() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tail = start_at(start_at(scheduler, 3), 1)
    tail.set_timesteps(STEPS)
    scheduler.set_timesteps(STEPS)
    assert len(scheduler.timesteps) == STEPS
    assert torch.equal(tail.sigmas, scheduler.sigmas[1:])
    assert dict(tail.config) == dict(scheduler.config)


def test_nothing_left_out() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    tail = start_at(scheduler, 0)
    scheduler.set_timesteps(STEPS)
    tail.set_timesteps(STEPS)
    assert torch.equal(tail.sigmas, scheduler.sigmas)


@pytest.mark.parametrize("start, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_refuses_at_the_call(start: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`start` is"):
        start_at(FlowMatchEulerDiscreteScheduler(), start)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), FlowMatchEulerInverseScheduler()])
def test_refuses_to_leave_nothing(scheduler: Any) -> None:
    with pytest.raises(ValueError, match="`start` is 5; takes 0 to 4 for a schedule of 5"):
        start_at(scheduler, STEPS).set_timesteps(STEPS)
