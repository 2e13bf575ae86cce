"""Equality constraints in noise optimization, where pictures are the noise itself or a tiny pipeline's."""

import math

import pytest
import torch

from tests.pipelines.test_noise_optimization_loop import SHAPE, Identity, seeded
from tests.tiny_pipelines import tiny_pipeline
from trimtab.optim.constrained import minimize_equality
from trimtab.pipelines import NoiseOptimizationPipeline
from trimtab.pipelines.noise_equality import EqualityAscent
from trimtab.pipelines.noise_objective import NoiseObjective
from trimtab.pipelines.noise_optimizers import NoiseProblem
from trimtab.pipelines.noise_output import Recorder
from trimtab.pipelines.noise_run import NoiseRun
from trimtab.rewards import CallableReward

TARGET = torch.randn(SHAPE, generator=seeded(50))
SHELL = math.sqrt(math.prod(SHAPE))


def start(rows=range(2)):
    return torch.stack([torch.randn(SHAPE, generator=seeded(row)) for row in rows])


def near(images, prompts):
    return -(images - 2 * TARGET).square().mean((1, 2, 3)) - 0.1 * images.pow(4).mean((1, 2, 3))


def shell_and_colour(images, latents):
    """The noise's norm at its shell, and the mean of each channel as given."""
    norm = latents.flatten(1).norm(dim=1, keepdim=True) / SHELL - 1
    return torch.cat([norm, images.mean((2, 3)) - torch.tensor([0.1, -0.2, 0.0])], 1)


def run(latents, steps=60, *, function=near, constraints=shell_and_colour, tolerance=1e-3, **settings):
    objective = NoiseObjective(Identity(), CallableReward(function, True), ["a"] * len(latents),
                               equality_constraints=constraints, equality_tolerance=tolerance)  # fmt: skip
    problem = NoiseProblem(latents, steps, lambda: latents)
    recorder = Recorder()
    for state in NoiseRun(objective, EqualityAscent(problem, **settings), steps):
        recorder.take(state)
    return recorder.output("latent")


def test_results_are_feasible_and_what_newtons_method_finds():
    latents = start()
    found = run(latents, 80, tolerance=1e-5)
    assert found.feasible == [True, True]
    assert shell_and_colour(found.latents, found.latents).abs().max() <= 1e-5
    for row in range(2):
        exact = minimize_equality(
            lambda x: -near(x[None], None)[0], lambda x: shell_and_colour(x[None], x[None])[0], latents[row]
        )
        reward = near(found.latents[row : row + 1], None)[0]
        assert exact.status == "converged" and reward >= -exact.value - 2e-3
    assert found.kkt.shape == (80, 2) and torch.isnan(found.kkt[-1]).all()
    assert (found.kkt[-6:-2].amin(0) < 0.05 * found.kkt[0]).all()


def test_the_reported_residual_is_that_of_the_best_multipliers():
    latents = start(rows=[0])
    found = run(latents, 3)
    x = latents[0].double().requires_grad_()
    (g,) = torch.autograd.grad(near(x[None], None).sum(), x)
    J = torch.func.jacrev(lambda x: shell_and_colour(x[None], x[None])[0])(latents[0].double()).flatten(1)
    c = shell_and_colour(latents, latents)[0]
    left = g.flatten() - J.T @ torch.linalg.pinv(J.T) @ g.flatten()
    assert found.kkt[0, 0].item() == pytest.approx(torch.cat([left, c.double()]).norm().item(), rel=1e-4)


def test_what_is_not_feasible_is_not_called_so_and_a_feasible_picture_comes_first():
    impossible = run(start(), 12, constraints=lambda images, latents: latents.flatten(1).square().sum(1) + 1.0)
    assert impossible.feasible == [False, False]
    found = run(start(), 30)
    assert all(found.feasible) and (found.best_step > 0).all()  # the start was worth more but broke the constraints


def test_a_batch_gives_what_its_items_give():
    both = run(start(), 20)
    for row in range(2):
        alone = run(start(rows=[row]), 20)
        assert torch.allclose(alone.latents[0], both.latents[row], atol=1e-6)


def test_a_sample_that_breaks_ends_alone():
    def broken(images, prompts):
        values = near(images, prompts)
        return torch.where((torch.arange(len(images)) == 1) & (images.mean() != start().mean()), math.nan, values)

    found = run(start(), 12, function=broken)
    assert found.stopped[0] is None and "not finite" in found.stopped[1]
    assert found.feasible[0]


def test_in_a_pipeline():
    pipe = NoiseOptimizationPipeline.from_pipe(
        tiny_pipeline("sd3"), reward=CallableReward(lambda x, p: -x[:, 0].mean((1, 2)), True)
    )
    pipe.set_progress_bar_config(disable=True)

    def constraints(images, latents):
        norm = latents.flatten(1).norm(dim=1) / math.sqrt(latents[0].numel()) - 1
        return torch.stack([norm, 10 * (images[:, 1].mean((1, 2)) - 0.5)], 1)

    options = {"num_inference_steps": 2, "generator": seeded(0), "num_optimization_steps": 24}
    found = pipe("a cat", equality_constraints=constraints, output_type="pt", **options)
    assert found.feasible == [True]
    assert abs(found.images[0, 1].mean().item() - 0.5) <= 1.1e-4
    assert found.latents.norm().item() == pytest.approx(math.sqrt(found.latents.numel()), rel=1.1e-3)
    for bad, message in (
        ({"optimizer": "best-of-n"}, "`equality_constraints` goes with"),
        ({"gradient": "jacobian-free"}, "`equality_constraints` goes with"),
        ({"equality_tolerance": 0.0}, "`equality_tolerance`"),
        ({"equality_constraints": lambda images, latents: images}, "`equality_constraints` gives shape"),
        ({"equality_constraints": lambda images, latents: torch.ones(len(images))}, "has no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a cat", **{"equality_constraints": constraints, **options, **bad})
    with pytest.raises(TypeError, match="`equality_constraints` is a float"):
        pipe("a cat", equality_constraints=1.0, **options)
