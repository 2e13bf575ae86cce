"""Gradient ascent that sets out from the best of several noises."""

import pytest
import torch

from tests.pipelines.test_noise_optimization_loop import noise, problem, quadratic, run
from trimtab.pipelines.noise_optimizers import GradientAscent, make_noise_optimizer

STARTS = {"num_starts": 4, "optimizer": torch.optim.SGD, "lr": 0.1, "regularization_weight": 0.0}


def test_the_ascent_sets_out_from_each_samples_best_start():
    first = noise(3)
    states = run(quadratic, first, 12, settings=STARTS)
    asked = problem(first, 12)
    starts = torch.stack([first, *(asked.sample() for _ in range(3))])
    rewards = torch.stack([quadratic(start, None) for start in starts])
    torch.testing.assert_close(torch.stack([state.rewards for state in states[:4]]), rewards)
    best = rewards.argmax(0)
    assert len(set(best.tolist())) > 1  # samples choose for themselves
    z = starts[best, torch.arange(3)]
    for state in states[4:]:
        torch.testing.assert_close(state.rewards, quadratic(z, None))
        z = z - 0.1 * (z - 0.5)


def test_no_gradient_is_computed_while_the_start_is_sought():
    seen = []

    def watched(images, prompts):
        seen.append(images.requires_grad)
        return quadratic(images, prompts)

    run(watched, noise(2), 12, settings=STARTS)
    assert seen == [False] * 4 + [True] * 7 + [False]  # the last picture is not stepped from


def test_a_failed_start_is_not_chosen():
    def sometimes(images, prompts):
        value = quadratic(images, prompts)
        return torch.where(images.mean((1, 2, 3)) > 0.1, torch.full_like(value, -1e9), value)

    states = run(sometimes, noise(4, seed=3), 12, settings=STARTS)
    rewards = torch.stack([state.rewards for state in states])
    torch.testing.assert_close(rewards[4], rewards[:4].max(0).values)


def test_they_take_at_most_a_third_of_a_run():
    made = make_noise_optimizer("gradient", problem(noise(1), 7), STARTS | {"num_starts": 50})
    for expected in (False, False, True):
        assert made.needs_gradient is expected
        made.ask()
        made.tell(torch.zeros(1, 1), torch.zeros(1, 1, *noise(1).shape[1:]))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_bad_numbers_are_named(value, error):
    with pytest.raises(error, match="`num_starts`"):
        GradientAscent(problem(noise(1)), num_starts=value)
