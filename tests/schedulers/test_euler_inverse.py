"""The Euler inverse scheduler: the stock schedule backwards, and closed forms on Gaussian flows."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.schedulers.gaussian_flow import MEAN, STD, run, velocity
from trimtab.schedulers import FlowMatchEulerInverseScheduler

SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shift": ({"shift": 3.0}, {"num_inference_steps": 7}),
    "dynamic": ({"use_dynamic_shifting": True}, {"num_inference_steps": 7, "mu": 0.8}),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"sigmas": [1.0, 0.6, 0.3], "mu": 2.0}),
    "terminal": ({"shift": 2.0, "shift_terminal": 0.1}, {"num_inference_steps": 7}),
    "karras": ({"use_karras_sigmas": True}, {"num_inference_steps": 7}),
    "sigmas": ({"shift": 3.0}, {"sigmas": [0.9, 0.5, 0.2]}),
    "timesteps": ({}, {"sigmas": [0.9, 0.5, 0.2], "timesteps": [950.0, 400.0, 100.0]}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_stock_one_backwards(name: str) -> None:
    config, arguments = SCHEDULES[name]
    stock = FlowMatchEulerDiscreteScheduler(**config)
    inverse = FlowMatchEulerInverseScheduler.from_config(stock.config)
    stock.set_timesteps(**arguments)
    inverse.set_timesteps(**arguments)
    assert torch.equal(inverse.sigmas, stock.sigmas.flip(0))
    assert torch.equal(inverse.timesteps[1:], stock.timesteps[1:].flip(0))
    assert inverse.timesteps[0] == 0


def test_error_is_of_first_order() -> None:
    # RMSE after inverting and sampling again, from an implementation in numpy with other draws.
    y = MEAN + STD * torch.randn(256, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (10, 20, 40, 80):
        noise = run(FlowMatchEulerInverseScheduler(shift=3.0), velocity, y, num_inference_steps=steps)
        again = run(FlowMatchEulerDiscreteScheduler(shift=3.0), velocity, noise, num_inference_steps=steps)
        errors.append(float((again - y).square().mean().sqrt()))
    assert errors == pytest.approx([0.292, 0.159, 0.084, 0.044], rel=0.15)
    assert all(1.75 < a / b < 2.1 for a, b in zip(errors, errors[1:], strict=False))


def test_gaussian_in_closed_form() -> None:
    """Each step multiplies a coordinate's distance from its mean by a number that the flow's slope gives."""
    scheduler = FlowMatchEulerInverseScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    factor, mean = torch.ones(4, dtype=torch.float64), MEAN.clone()
    for s, following in zip(sigmas, sigmas[1:], strict=False):
        slope = (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2)
        factor *= 1 + (following - s) * slope
        mean = (1 - following) * MEAN
    y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = mean + factor * (y - MEAN)
    torch.testing.assert_close(run(scheduler, velocity, y, num_inference_steps=10), expected, rtol=1e-6, atol=1e-6)


def test_saved_and_loaded(tmp_path: Any) -> None:
    scheduler = FlowMatchEulerInverseScheduler(shift=2.5, use_dynamic_shifting=True)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchEulerInverseScheduler.from_pretrained(tmp_path)
    assert {**loaded.config, "_use_default_values": None} == {**scheduler.config, "_use_default_values": None}
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert back.config.shift == 2.5


def test_half_precision_samples_keep_their_dtype() -> None:
    scheduler = FlowMatchEulerInverseScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(2, dtype=torch.bfloat16)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == torch.bfloat16


def test_refuses() -> None:
    with pytest.raises(ValueError, match="`stochastic_sampling` is True"):
        FlowMatchEulerInverseScheduler(stochastic_sampling=True).set_timesteps(4)
    scheduler = FlowMatchEulerInverseScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(2)
    with pytest.raises(ValueError, match="`timestep` is the integer 0"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="`timestep` is 123.0; takes one"):
        scheduler.step(x, 123.0, x)
