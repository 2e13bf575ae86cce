"""Searches of noise without gradients, in the loop and under constraints."""

import numpy as np
import pytest
import torch

from tests.pipelines.test_noise_optimization_loop import SHAPE, Identity, seeded
from trimtab.pipelines.noise_objective import NoiseObjective
from trimtab.pipelines.noise_optimizers import NoiseProblem, make_noise_optimizer
from trimtab.pipelines.noise_run import NoiseRun
from trimtab.pipelines.noise_searches import _window
from trimtab.rewards import CallableReward

SEARCHES = ("consensus", "directional", "cma")


def noise(batch=2):
    return torch.stack([torch.randn(SHAPE, generator=seeded(row)) for row in range(batch)])


def steps_of_the_mean(images, prompts):
    """Piecewise constant: no gradient."""
    return (20 * images.mean((1, 2, 3))).round()


def run(optimizer, latents, steps, *, function=steps_of_the_mean, rows=None, constraints=None, **settings):
    rows = range(len(latents)) if rows is None else rows
    generators = [seeded(100 + row) for row in rows]
    objective = NoiseObjective(
        Identity(), CallableReward(function, False), ["a"] * len(latents), constraints=constraints
    )
    problem = NoiseProblem(latents, steps, lambda: torch.randn(latents.shape), generators)
    made = make_noise_optimizer(optimizer, problem, settings)
    return list(NoiseRun(objective, made, steps))


@pytest.mark.parametrize("optimizer, steps", [("consensus", 12), ("directional", 96), ("cma", 12)])
def test_a_reward_without_a_gradient_rises_on_the_noise_sphere(optimizer, steps):
    start = noise()
    states = run(optimizer, start, steps)
    assert states[-1].num_evaluations == 96
    first = steps_of_the_mean(start, None)
    assert (states[-1].best_rewards >= first + 3).all()
    norms = states[-1].best_latents.flatten(1).norm(dim=1)
    assert torch.allclose(norms, start.flatten(1).norm(dim=1), rtol=1e-5)
    assert torch.equal(steps_of_the_mean(states[-1].best_latents, None), states[-1].best_rewards)


@pytest.mark.parametrize("optimizer", SEARCHES)
def test_the_start_is_the_first_candidate(optimizer):
    start = noise()
    problem = NoiseProblem(start, 5, lambda: start, [seeded(0), seeded(1)])
    assert torch.allclose(make_noise_optimizer(optimizer, problem, {}).ask()[:, 0], start, atol=1e-6)


def quarters(images, prompts):
    """The share of a picture's quarters that are bright: each by itself is likely, all at once are not."""
    height, width = images.shape[2] // 2, images.shape[3] // 2
    means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), (height, width))
    return (means > 1 / (3 * height * width) ** 0.5).flatten(1).float().mean(1)


def test_windows_mend_a_part_and_leave_the_rest():
    start = torch.stack([torch.randn(3, 8, 8, generator=seeded(row)) for row in range(20)])
    options = {"num_particles": 4, "num_starts": 3, "width": 1.0, "width_end": 0.7, "alpha": float("inf")}
    found = run("consensus", start, 16, function=quarters, region=0.5, **options)[-1]
    fresh = run("best-of-n", start, 64, function=quarters)[-1]
    assert found.num_evaluations == fresh.num_evaluations == 64
    assert found.best_rewards.mean() > fresh.best_rewards.mean() + 0.08


def test_directional_search_sets_out_from_the_best_start_and_from_each_success():
    start, asked = noise(), []

    def told(images, prompts):
        asked.append(images.clone())
        return images.mean((1, 2, 3))

    states = run("directional", start, 60, function=told, num_starts=6, region=0.5, r0=2.0, num_directions=4)
    for row in range(2):
        values = torch.tensor([float(images[row].mean()) for images in asked])
        assert states[-1].best_rewards[row] > values[:6].max()
        improved = [step for step in range(6, 60) if values[step] > values[:step].max()]
        assert improved
        norms = torch.stack([images[row].norm() for images in asked[6:]])
        assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-4)  # on the best start's sphere


@pytest.mark.parametrize("shape", [(4, 16, 12), (2, 3, 16, 12), (64, 5)])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_window_covers_its_share_at_any_place(shape, share):
    windows = torch.stack([_window(shape, share, seeded(seed)) for seed in range(200)])
    assert set(windows.unique().tolist()) <= {0.0, 1.0}
    assert torch.allclose(windows.flatten(1).mean(1), torch.tensor(share**2), atol=0.02)
    assert len(windows.flatten(1).unique(dim=0)) > (0 if share == 1 else 25)  # places


@pytest.mark.parametrize("optimizer", SEARCHES)
def test_a_batch_gives_what_its_items_give_and_global_generators_rest(optimizer):
    start, state = noise(), np.random.get_state()[1].copy()
    both = run(optimizer, start, 9)[-1]
    for row in range(2):
        one = run(optimizer, start[row : row + 1], 9, rows=[row])[-1]
        assert torch.equal(one.best_latents[0], both.best_latents[row])
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("optimizer, steps", [("consensus", 20), ("directional", 160), ("cma", 20), ("best-of-n", 160)])
def test_what_is_called_feasible_is(optimizer, steps):
    def constraints(images, latents):
        return torch.stack([images[:, 0].mean((1, 2)) - 0.1, -images[:, 1].mean((1, 2))], 1)

    start = noise()
    start[0] += 1.0  # infeasible
    states = run(optimizer, start, steps, constraints=constraints)
    last = states[-1]
    held = constraints(last.best_latents, None).clamp_min(0).sum(1)
    assert torch.allclose(last.violations, held, atol=1e-6)
    feasible = [bool((state.violations <= 0)[1]) for state in states]
    assert feasible == sorted(feasible)  # once feasible, always feasible
    if optimizer == "consensus":
        assert (last.violations == 0).all()


def test_a_sample_that_breaks_ends_without_the_others():
    def broken(images, prompts):
        return torch.where(images[:, 0, 0, 0] > 50, torch.nan, images.mean((1, 2, 3)))

    start = noise()
    start[1, 0, 0, 0] = 1e4
    for optimizer in ("consensus", "cma"):
        last = run(optimizer, start, 6, function=broken)[-1]
        assert "not finite" in last.stopped[1] and last.stopped[0] is None
        assert last.best_rewards[0] > start[0].mean()


def test_bad_settings_are_named():
    problem = NoiseProblem(noise(), 5, noise, None)
    with pytest.raises(ValueError, match="at most 200"):
        make_noise_optimizer("directional", problem, {"num_directions": 500})
    with pytest.raises(ValueError, match="`num_particles`"):
        make_noise_optimizer("cma", problem, {"num_particles": 1})
    with pytest.raises(ValueError, match="best-of-n, consensus, directional, cma"):
        make_noise_optimizer("nelder-mead", problem, {})
    for optimizer in ("consensus", "directional"):
        for region in (0.0, 1.5):
            with pytest.raises(ValueError, match="`region`"):
                make_noise_optimizer(optimizer, problem, {"region": region})
    with pytest.raises(ValueError, match="`constraints` gives shape"):
        run("consensus", noise(), 3, constraints=lambda images, latents: images)
