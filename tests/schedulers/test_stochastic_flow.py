"""Stochastic transitions of a flow: the ODE's marginals, exact densities, and stock pipelines' loops."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from tests.schedulers.gaussian_flow import MEAN, STD, run, velocity
from trimtab.schedulers import FlowMatchStochasticScheduler, flow_transition


def sampled(count: int, steps: int, **options: Any) -> torch.Tensor:
    scheduler = FlowMatchStochasticScheduler(**options)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    with scheduler.recording(generator):
        return run(scheduler, velocity, noise, num_inference_steps=steps)


@pytest.mark.parametrize("options", [{}, {"transition": "ddim", "noise_level": 1.0}, {"shift": 3.0}])
def test_marginals_are_the_flow_s(options: dict[str, Any]) -> None:
    """The data's mean and deviation, as the ODE from the same noise has them."""
    found = sampled(4000, 200, **options)
    stock = FlowMatchEulerDiscreteScheduler(shift=options.get("shift", 1.0))
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ode = run(stock, velocity, noise, num_inference_steps=200)
    for samples in (found, ode):
        assert ((samples.mean(0) - MEAN) / STD).abs().max() < 0.07
        off = (samples.std(0) / STD - 1).abs()  # the narrowest coordinate sees the steps' length most
        assert off[1:].max() < 0.06 and off[0] < 0.12


@pytest.mark.parametrize(("steps", "variance", "tolerance"), [(200, 1.0, 0.03), (20, 0.976, 0.03)])
def test_variance_of_standard_normal_data(steps: int, variance: float, tolerance: float) -> None:
    scheduler, generator = FlowMatchStochasticScheduler(), torch.Generator().manual_seed(0)

    def flow(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2)

    x = torch.randn(30_000, 1, generator=generator, dtype=torch.float64)
    with scheduler.recording(generator):
        x = run(scheduler, flow, x, num_inference_steps=steps)
    assert float(x.var()) == pytest.approx(variance, abs=tolerance)


@pytest.mark.parametrize("transition", ["sde", "ddim"])
def test_without_noise_it_is_euler(transition: str) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = FlowMatchStochasticScheduler(noise_level=0.0, transition=transition, shift=3.0)
    expected = run(FlowMatchEulerDiscreteScheduler(shift=3.0), velocity, x, num_inference_steps=6)
    torch.testing.assert_close(run(scheduler, velocity, x, num_inference_steps=6), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transition", ["sde", "ddim"])
def test_log_probabilities_are_those_of_the_draws(transition: str) -> None:
    scheduler = FlowMatchStochasticScheduler(transition=transition)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    with scheduler.recording(generator) as trajectory:
        last = run(scheduler, velocity, x, num_inference_steps=6)
    assert len(trajectory) == (6 if transition == "sde" else 5)  # DDIM's step to 0 has no noise
    for taken in trajectory:
        v = velocity(taken.sample, float(taken.timestep) / 1000)
        mean, std = scheduler.transition(v, taken.timestep, taken.sample)
        expected = Normal(mean, torch.tensor(std, dtype=torch.float64)).log_prob(taken.prev_sample).sum(1)
        torch.testing.assert_close(taken.log_prob, expected)
        again = scheduler.log_prob(v, taken.timestep, taken.sample, taken.prev_sample, reduce="mean")
        torch.testing.assert_close(again, expected / 4)
    assert torch.equal(trajectory[0].sample, x)
    if transition == "sde":
        assert torch.equal(trajectory[-1].prev_sample, last)
    for first, second in zip(trajectory, trajectory[1:], strict=False):
        assert torch.equal(first.prev_sample, second.sample)


def test_first_step_uses_the_second_sigma() -> None:
    """sigma = 1, where 1 - sigma vanishes: the formula of Flow-GRPO with sigmas[1] there."""
    mean, std = flow_transition(torch.tensor([2.0]), torch.tensor([3.0]), 1.0, 0.8, noise_level=0.7, first_sigma=0.8)
    w2 = 0.49 / 0.2
    assert std == pytest.approx((w2 * 0.2) ** 0.5)
    assert float(mean) == pytest.approx(3 * (1 - w2 * 0.2 / 2) - 2 * 0.2)


def test_gradient_reaches_the_network() -> None:
    scheduler = FlowMatchStochasticScheduler()
    scheduler.set_timesteps(4)
    weight = torch.tensor(0.3, requires_grad=True)
    x, following = torch.ones(2, 3), torch.zeros(2, 3)
    log_prob = scheduler.log_prob(weight * x, scheduler.timesteps[1], x, following)
    log_prob.sum().backward()
    mean, std = scheduler.transition(0.3 * x, scheduler.timesteps[1], x)
    ahead, _ = scheduler.transition(1.3 * x, scheduler.timesteps[1], x)
    assert float(weight.grad) == pytest.approx(float(((following - mean) / std**2 * (ahead - mean)).sum()), rel=1e-4)


def test_saved_seeded_and_half_precision(tmp_path: Any) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=2.5)
    scheduler = FlowMatchStochasticScheduler.from_config(stock.config, noise_level=0.4, transition="ddim")
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchStochasticScheduler.from_pretrained(tmp_path)
    assert (loaded.config.shift, loaded.config.noise_level, loaded.config.transition) == (2.5, 0.4, "ddim")
    loaded.set_timesteps(4)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    rows = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    out = loaded.step(x, loaded.timesteps[0], x, generator=rows)
    assert out.prev_sample.dtype == torch.bfloat16 and out.log_prob.dtype == torch.float32
    assert torch.equal(out.prev_sample[0], out.prev_sample[1])


def test_refuses() -> None:
    for options in ({"noise_level": -1.0}, {"noise_level": 1.5, "transition": "ddim"}, {"transition": "ode"}):
        with pytest.raises(ValueError, match=f"`{list(options)[0]}`"):
            FlowMatchStochasticScheduler(**options)
    with pytest.raises(TypeError, match="`noise_level`"):
        FlowMatchStochasticScheduler(noise_level="0.7")
    scheduler = FlowMatchStochasticScheduler(transition="ddim")
    scheduler.set_timesteps(4)
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="`generator` is None"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="no noise"):
        scheduler.log_prob(x, scheduler.timesteps[-1], x, x)
    with pytest.raises(ValueError, match="`sigma` is 0.5"):
        flow_transition(x, x, 0.5, 0.5)
