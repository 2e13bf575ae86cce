"""Solvers along a flow's schedule: orders of convergence, round trips, the formulas call by call, stock pipelines."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp

import trimtab.schedulers as schedulers
from tests.more_tiny_pipelines import GUIDED, guided_pipeline
from tests.schedulers.gaussian_flow import MEAN, STD, run, velocity
from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS
from trimtab.schedulers import (
    FlowMatchEulerInverseScheduler,
    FlowMatchFireFlowInverseScheduler,
    FlowMatchFireFlowScheduler,
    FlowMatchMidpointInverseScheduler,
    FlowMatchMidpointScheduler,
    FlowMatchUniInvScheduler,
    start_at,
)

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")

EULER = FlowMatchEulerDiscreteScheduler
# The inverse, the sampler that it belongs to, and calls of the network for N steps.
SOLVERS: dict[str, tuple[type, type, Any]] = {
    "euler": (FlowMatchEulerInverseScheduler, EULER, lambda n: n),
    "uni-inv": (FlowMatchUniInvScheduler, EULER, lambda n: n + 1),
    "midpoint": (FlowMatchMidpointInverseScheduler, FlowMatchMidpointScheduler, lambda n: 2 * n),
    "fire-flow": (FlowMatchFireFlowInverseScheduler, FlowMatchFireFlowScheduler, lambda n: n + 1),
}
WIDE = torch.tensor([0.5, 0.8, 1.0, 2.0], dtype=torch.float64)


def wide(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The Gaussian flow's velocity without its narrow coordinates, where steps would have to be tiny."""
    variance = (1 - sigma) ** 2 * WIDE**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * WIDE**2) / variance * (x - (1 - sigma) * MEAN)


def bent(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.sin(2 * x + sigma) - 0.3 * x


def samples(seed: int = 0, count: int = 256) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nodes(steps: int) -> list[float]:
    """From one to zero in equal steps, without the zero: the stock scheduler's own begin at 1000 and end at 1."""
    return [1 - step / steps for step in range(steps)]


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("name, order", [("euler", 1), ("midpoint", 2), ("fire-flow", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Towards the solution of a flow that is bent in x and in time, by an adaptive method of order eight."""
    inverse, sampler, _ = SOLVERS[name]
    x = samples(count=16)
    for scheduler, span in ((inverse, (0.0, 1.0)), (sampler, (1.0, 0.0))):
        flow = solve_ivp(
            lambda s, values: bent(torch.from_numpy(values), s).numpy(),
            span,
            x.flatten().numpy(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
        )
        end = torch.from_numpy(flow.y[:, -1]).reshape(x.shape)
        errors = [rms(run(scheduler(), bent, x, sigmas=nodes(n)) - end) for n in (10, 20, 40)]
        rates = [a / b for a, b in zip(errors, errors[1:], strict=False)]
        assert rates == pytest.approx([2**order] * 2, rel=0.2), errors


@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_flow_in_closed_form(name: str) -> None:
    """The path from a draw of the noise keeps its place in units of the spread: (x - mean) / std stays as it is."""
    inverse, sampler, _ = SOLVERS[name]
    noise = samples()
    data = MEAN + WIDE * noise
    assert rms(run(inverse(), wide, data, sigmas=nodes(200)) - noise) < 0.02
    assert rms(run(sampler(), wide, noise, sigmas=nodes(200)) - data) < 0.02


def test_uni_inv_comes_near_the_inverse_of_euler_in_second_order() -> None:
    y = MEAN + WIDE * samples()
    errors, unlike = [], []
    for steps in (20, 40, 80, 160):
        noise = run(FlowMatchUniInvScheduler(shift=2.0), wide, y, num_inference_steps=steps)
        errors.append(rms(run(EULER(shift=2.0), wide, noise, num_inference_steps=steps) - y))
        plain = run(FlowMatchEulerInverseScheduler(shift=2.0), wide, y, num_inference_steps=steps)
        unlike.append(rms(run(EULER(shift=2.0), wide, plain, num_inference_steps=steps) - y))
    assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx([4, 4, 4], rel=0.2)
    assert errors[0] < unlike[0] / 5


def test_uni_inv_on_the_narrow_gaussians() -> None:
    # RMSE after inverting and sampling again, from an implementation in numpy with other draws.
    y = MEAN + STD * samples()
    errors = []
    for steps in (10, 20, 40, 80):
        noise = run(FlowMatchUniInvScheduler(shift=3.0), velocity, y, num_inference_steps=steps)
        errors.append(rms(run(EULER(shift=3.0), velocity, noise, num_inference_steps=steps) - y))
    assert errors == pytest.approx([0.054, 0.024, 0.014, 0.005], rel=0.25)


def test_many_sweeps_are_the_inverse_of_euler() -> None:
    y = samples(count=16)
    noise = run(FlowMatchUniInvScheduler(num_sweeps=40), bent, y, num_inference_steps=12)
    assert rms(run(EULER(), bent, noise, num_inference_steps=12) - y) < 1e-6  # the stock one is float32
    once = run(FlowMatchUniInvScheduler(num_sweeps=1), bent, y, num_inference_steps=12)
    twice = run(FlowMatchUniInvScheduler(num_sweeps=2), bent, y, num_inference_steps=12)
    assert rms(twice - noise) < rms(once - noise) / 3


@pytest.mark.parametrize("name", SOLVERS)
def test_constant_velocity_is_solved_exactly(name: str) -> None:
    inverse, sampler, _ = SOLVERS[name]
    y, direction = samples(), samples(1)
    noise = run(inverse(shift=3.0), lambda x, sigma: direction, y, num_inference_steps=7)
    torch.testing.assert_close(noise, y + direction, rtol=0, atol=1e-6)
    back = run(sampler(shift=3.0), lambda x, sigma: direction, noise, num_inference_steps=7)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["midpoint", "fire-flow"])
def test_second_order_is_exact_where_velocity_is_linear_in_time(name: str) -> None:
    """dx/ds = s has the solution x + s^2 / 2."""
    for scheduler, expected in zip(SOLVERS[name][:2], (0.5, -0.5), strict=True):
        moved = run(scheduler(shift=3.0), lambda x, s: torch.full_like(x, s), samples(), num_inference_steps=3)
        torch.testing.assert_close(moved, samples() + expected, rtol=0, atol=1e-6)


# ---- the formulas of the papers, in plain loops ------------------------------------------------------------


def uni_inv(s_i: list[float], x: torch.Tensor, *, zero_initial: bool = False) -> torch.Tensor:
    w = torch.zeros_like(x) if zero_initial else bent(x, s_i[0])
    for s, following in zip(s_i, s_i[1:], strict=False):
        w = bent(x + (following - s) * w, following)
        x = x + (following - s) * w
    return x


def rf_solver(s_i: list[float], x: torch.Tensor) -> torch.Tensor:
    for s, following in zip(s_i, s_i[1:], strict=False):
        h = following - s
        p = bent(x, s)
        m = bent(x + h / 2 * p, s + h / 2)
        x = x + h * p + h**2 / 2 * (m - p) / (h / 2)
    return x


def fire_flow(s_i: list[float], x: torch.Tensor) -> torch.Tensor:
    p = bent(x, s_i[0])
    for s, following in zip(s_i, s_i[1:], strict=False):
        h = following - s
        p = bent(x + h / 2 * p, s + h / 2)
        x = x + h * p
    return x


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize(
    "scheduler, formula, options",
    [
        (FlowMatchUniInvScheduler, uni_inv, {}),
        (FlowMatchUniInvScheduler, uni_inv, {"zero_initial": True}),
        (FlowMatchMidpointScheduler, rf_solver, {}),
        (FlowMatchMidpointInverseScheduler, rf_solver, {}),
        (FlowMatchFireFlowScheduler, fire_flow, {}),
        (FlowMatchFireFlowInverseScheduler, fire_flow, {}),
    ],
)
def test_formula(scheduler: type, formula: Any, options: dict[str, Any], start: int) -> None:
    stock = EULER(shift=3.0)
    stock.set_timesteps(6)
    kept = stock.sigmas.tolist()[start:]
    ours = scheduler.from_config(stock.config, **options)
    result = run(start_at(ours, start), bent, samples(), num_inference_steps=6)
    expected = formula(kept[::-1] if ours.inverse else kept, samples(), **options)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_a_schedule_with_its_own_timesteps_has_those_of_the_middles() -> None:
    scheduler = FlowMatchMidpointScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5], timesteps=[900.0, 300.0])
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert scheduler.timesteps.tolist() == [900.0, 600.0, 300.0, 150.0]


# ---- in stock pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "sana"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_in_a_stock_pipeline(name: str, solver: str) -> None:
    inverse, sampler, calls = SOLVERS[solver]
    pipe = guided_pipeline(name)
    call = GUIDED[name].call([0], 1.0)
    steps = 6
    stock = EULER.from_config(pipe.scheduler.config)
    counted: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: counted.append(1))

    def latents(scheduler: Any, start: torch.Tensor) -> torch.Tensor:
        pipe.scheduler = scheduler
        return pipe(**call, num_inference_steps=steps, latents=start, output_type="latent", return_dict=False)[0]

    y = 0.5 * torch.randn(1, *GUIDED[name].latent_shape, generator=torch.Generator().manual_seed(0))
    noise = latents(inverse.from_config(stock.config), y)
    assert len(counted) == calls(steps)
    back = latents(sampler.from_config(stock.config), noise)
    plain = latents(stock, latents(FlowMatchEulerInverseScheduler.from_config(stock.config), y))
    assert rms(back - y) < 0.3 * rms(noise - y)
    if solver != "euler":
        assert rms(back - y) < 0.5 * rms(plain - y)


@pytest.mark.parametrize("solver", SOLVERS)
def test_callbacks_and_progress_count_as_usual(solver: str) -> None:
    inverse, _, calls = SOLVERS[solver]
    pipe = guided_pipeline("sd3")
    pipe.scheduler = inverse.from_config(pipe.scheduler.config)
    seen: list[int] = []

    def step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    pipe(
        **GUIDED["sd3"].call([0], 1.0),
        num_inference_steps=3,
        callback_on_step_end=step_end,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    assert seen == list(range(calls(3)))


# ---- configs and refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in schedulers.__all__ if name.startswith("FlowMatch")])
def test_saved_loaded_and_converted(name: str, tmp_path: Any) -> None:
    stock = EULER(shift=2.5, use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02)
    ours = getattr(schedulers, name).from_config(stock.config)
    ours.save_pretrained(tmp_path)
    loaded = getattr(schedulers, name).from_pretrained(tmp_path)
    for scheduler in (ours, loaded, EULER.from_config(loaded.config)):
        for key in ("shift", "use_dynamic_shifting", "max_shift", "shift_terminal"):
            assert scheduler.config[key] == stock.config[key]
    loaded.set_timesteps(5, mu=0.7)
    stock.set_timesteps(5, mu=0.7)
    expected = stock.sigmas.flip(0) if loaded.inverse else stock.sigmas
    assert torch.equal(loaded.sigmas[[0, -1]], expected[[0, -1]])


def test_options_of_uni_inv_are_saved(tmp_path: Any) -> None:
    FlowMatchUniInvScheduler(shift=2.0, zero_initial=True, num_sweeps=3).save_pretrained(tmp_path)
    loaded = FlowMatchUniInvScheduler.from_pretrained(tmp_path)
    assert (loaded.config.zero_initial, loaded.config.num_sweeps, loaded.config.shift) == (True, 3, 2.0)
    again = FlowMatchUniInvScheduler.from_config(EULER().config, zero_initial=True)
    assert again.config.zero_initial and again.config.num_sweeps == 1


@pytest.mark.parametrize(
    "options, error",
    [
        ({"num_sweeps": 0}, ValueError),
        ({"num_sweeps": 1.5}, TypeError),
        ({"num_sweeps": True}, TypeError),
        ({"zero_initial": 1}, TypeError),
    ],
)
def test_uni_inv_refuses(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{next(iter(options))}` is"):
        FlowMatchUniInvScheduler(**options)


@pytest.mark.parametrize("kind", [FlowMatchUniInvScheduler, FlowMatchMidpointScheduler, FlowMatchFireFlowScheduler])
def test_a_run_does_not_begin_within_a_step(kind: type) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="can't begin at call 1, within a step; takes trimtab.schedulers.start_at"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_midpoint_begins_at_any_of_its_steps() -> None:
    """As an image-to-image pipeline begins: at timesteps[start * order]."""
    scheduler = FlowMatchMidpointScheduler(shift=3.0)
    expected = run(start_at(scheduler, 2), bent, samples(), num_inference_steps=5)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2 * scheduler.order)
    x = samples()
    for t in scheduler.timesteps[2 * scheduler.order :]:
        x = scheduler.step(bent(x, float(t) / 1000), t, x, return_dict=False)[0]
    assert torch.equal(x, expected)
