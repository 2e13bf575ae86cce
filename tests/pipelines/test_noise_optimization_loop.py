"""The loop of noise optimization against closed forms and torch.optim, where pictures are the noise itself."""

import functools
import math

import pytest
import torch

from trimtab.pipelines.noise_objective import NoiseObjective
from trimtab.pipelines.noise_optimizers import (
    BestOfN,
    GradientAscent,
    NoiseOptimizer,
    NoiseProblem,
    make_noise_optimizer,
    norm_log_likelihood,
    norm_log_likelihood_gradient,
)
from trimtab.pipelines.noise_output import Recorder
from trimtab.pipelines.noise_presets import NOISE_PRESETS
from trimtab.pipelines.noise_run import NoiseRun
from trimtab.pipelines.noise_sphere import SphereMomentum
from trimtab.rewards import CallableReward

SHAPE = (3, 4, 4)
PAPER = NOISE_PRESETS["paper"].optimizer


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Identity:
    """A sampler whose pictures are its noise."""

    def __call__(self, latents, *, prompt_index=None):
        return latents * 1.0

    def decode(self, latents):
        return latents


def problem(latents, steps=50, seed=7):
    generator = seeded(seed)
    return NoiseProblem(latents, steps, lambda: torch.randn(latents.shape, generator=generator))


def run(function, latents, steps=50, *, optimizer="gradient", differentiable=True, settings=None, **options):
    """All states of a run on a function of pictures and prompts."""
    reward = CallableReward(function, differentiable)
    monitor = options.pop("monitor", None)
    batch_size, gradient = options.pop("batch_size", None), options.pop("gradient", "full")
    prompts = [f"prompt {row}" for row in range(len(latents))]
    objective = NoiseObjective(
        Identity(),
        reward,
        prompts,
        batch_size=batch_size,
        gradient=gradient,
        monitor=monitor and CallableReward(monitor),
    )
    made = make_noise_optimizer(optimizer, problem(latents, steps), settings or {})
    return list(NoiseRun(objective, made, steps, **options))


def noise(batch=2, seed=0):
    return torch.randn(batch, *SHAPE, generator=seeded(seed))


def quadratic(images, prompts, target=0.5, curvature=1.0):
    return -0.5 * curvature * (images - target).square().sum((1, 2, 3))


# ---- the regularizer ---------------------------------------------------------------------------------------


def test_the_likeliest_norm_is_sqrt_of_d_minus_1():
    z = torch.nn.Parameter(1.3 * torch.randn(1, 1024, generator=seeded(0)))
    optimizer = torch.optim.SGD([z], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (-norm_log_likelihood(z)).sum().backward()
        optimizer.step()
    assert z.norm().item() == pytest.approx(math.sqrt(1023), abs=2e-5)
    assert norm_log_likelihood(z).item() == pytest.approx(1023 * math.log(math.sqrt(1023)) - 1023 / 2, abs=1e-3)


def test_its_gradient_is_autograds():
    z = torch.randn(3, 4, 8, 8, generator=seeded(1)).mul_(1.2).requires_grad_()
    (gradient,) = torch.autograd.grad(norm_log_likelihood(z).sum(), z)
    torch.testing.assert_close(norm_log_likelihood_gradient(z), gradient, rtol=1e-5, atol=1e-6)


def test_it_is_float32_whatever_the_noise_is():
    """At d = 16384 the value is about 71000, where float16 has no numbers at all."""
    z = torch.randn(1, 4, 64, 64, generator=seeded(2))
    half = norm_log_likelihood(z.half())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(norm_log_likelihood(z).item(), rel=1e-5)
    with pytest.raises(ValueError, match="all zero"):
        norm_log_likelihood(torch.zeros(1, 4))


# ---- the paper's loop --------------------------------------------------------------------------------------


def test_iterates_are_the_recursion_by_hand():
    """b = g first, then b = 0.9 b + g; z -= lr (g + 0.9 b), with g = a (z - c) where nothing clips or regularizes."""
    start, lr, curvature = noise(), 0.05, 0.7
    settings = {**PAPER, "lr": lr, "max_grad_norm": None, "regularization_weight": 0.0}
    states = run(functools.partial(quadratic, curvature=curvature), start, 12, settings=settings)
    z, b = start.double(), None
    for state in states:
        torch.testing.assert_close(state.images.double(), z, rtol=0, atol=1e-6)
        g = curvature * (z - 0.5)
        b = g if b is None else 0.9 * b + g
        z = z - lr * (g + 0.9 * b)


def test_the_loop_is_the_official_one_for_a_single_sample():
    """Reward, regularizer and clip as ReNO writes them: one loss through autograd, clip_grad_norm_, torch's SGD."""
    start = 1.2 * noise(1)
    z = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([z], lr=5.0, momentum=0.9, nesterov=True)
    iterates = []
    for _ in range(20):
        iterates.append(z.detach().clone())
        optimizer.zero_grad()
        norm = z.norm()
        loss = -quadratic(z, None).sum() + 0.01 * (0.5 * norm**2 - (z.numel() - 1) * norm.log())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(z, 0.1)
        optimizer.step()
    states = run(quadratic, start, 20, settings=PAPER)
    for state, iterate in zip(states, iterates, strict=True):
        torch.testing.assert_close(state.images, iterate, rtol=0, atol=1e-5)


def test_the_first_step_is_no_longer_than_the_clip_allows():
    for scale, most in ((1e-3, None), (100.0, 0.95)):
        start = noise(3)
        settings = {**PAPER, "regularization_weight": 0.0}
        first, second = run(functools.partial(quadratic, curvature=scale), start, 2, settings=settings)
        moved = (second.images - first.images).flatten(1).norm(dim=1)
        lengths = (scale * (start - 0.5)).flatten(1).norm(dim=1)
        expected = torch.full((3,), most) if most else 1.9 * 5.0 * lengths
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_samples_are_clipped_one_by_one():
    """A steep neighbour doesn't shorten a sample's step, as a clip of the whole batch would."""
    start = noise(2)
    start[1] *= 50.0
    settings = {**PAPER, "regularization_weight": 0.0}
    together = run(functools.partial(quadratic, curvature=1e-2), start, 3, settings=settings)
    alone = run(functools.partial(quadratic, curvature=1e-2), start[:1], 3, settings=settings)
    torch.testing.assert_close(together[-1].images[:1], alone[-1].images)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, functools.partial(torch.optim.RMSprop, lr=0.1)])
def test_any_torch_optimizer_climbs(optimizer):
    start = noise()
    settings = {"regularization_weight": 0.0}
    states = run(quadratic, start, 10, optimizer=optimizer, settings=settings)
    parameters = [torch.nn.Parameter(row.clone()) for row in start]
    plain = [optimizer([parameter]) for parameter in parameters]
    for state in states:
        torch.testing.assert_close(state.images, torch.stack([p.detach() for p in parameters]), rtol=0, atol=1e-6)
        for parameter, step in zip(parameters, plain, strict=True):
            parameter.grad = parameter.detach() - 0.5
            step.step()


def test_optimizers_that_do_not_fit_are_refused():
    for optimizer, error, words in (
        ("newton", ValueError, "`optimizer` is 'newton'; takes gradient, best-of-n"),
        (3, TypeError, "`optimizer` is a int; takes a name"),
        (torch.optim.LBFGS, ValueError, "LBFGS, whose step needs a closure"),
        (lambda parameters: None, TypeError, "made a NoneType; takes what makes a torch.optim.Optimizer"),
    ):
        with pytest.raises(error, match=words):
            make_noise_optimizer(optimizer, problem(noise()), {})
    for settings, error, words in (
        ({"lr": 0.0}, ValueError, "`lr` is 0.0"),
        ({"lr": math.nan}, ValueError, "`lr` is nan"),
        ({"momentum": 1.0}, ValueError, "`momentum` is 1.0"),
        ({"regularization_weight": -1}, ValueError, "`regularization_weight` is -1"),
        ({"max_grad_norm": 0}, ValueError, "`max_grad_norm` is 0"),
        ({"max_grad_norm": "1"}, TypeError, "`max_grad_norm` is a str"),
        ({"speed": 1}, TypeError, "speed"),
    ):
        with pytest.raises(error, match=words):
            make_noise_optimizer("gradient", problem(noise()), settings)


# ---- steps on the sphere -----------------------------------------------------------------------------------


def test_the_sphere_is_kept_and_the_reward_found():
    """On a sphere the nearest point to a target is its projection."""
    target = torch.randn(SHAPE, generator=seeded(3))
    start = noise(2)
    states = run(lambda images, prompts: -(images - target).square().sum((1, 2, 3)), start, 120, settings={"lr": 0.02})
    norms = torch.stack([state.images.flatten(1).norm(dim=1) for state in states])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-5, atol=0)
    best = target * (start.flatten(1).norm(dim=1) / target.norm()).view(-1, 1, 1, 1)
    assert (states[-1].best_images - best).flatten(1).norm(dim=1).max() < 0.2


def test_the_first_step_on_the_sphere_is_by_hand():
    z = torch.nn.Parameter(torch.randn(30, generator=seeded(0)).double())
    g = torch.randn(30, generator=seeded(1)).double()
    start = z.detach().clone()
    optimizer = SphereMomentum([z], lr=0.1, momentum=0.5)
    z.grad = g.clone()
    optimizer.step()
    u = g - start * (g @ start) / (start @ start)
    u = u / u.square().mean().sqrt()
    moved = start - 0.1 * 1.5 * u
    torch.testing.assert_close(z.detach(), moved * start.norm() / moved.norm())
    z.grad = z.detach().clone()  # along z: nothing to follow, and no division by zero
    optimizer.step()
    assert torch.isfinite(z).all()


def test_steps_on_the_sphere_ignore_how_a_reward_is_scaled():
    start = noise()
    small, large = (
        run(lambda images, prompts, s=s: s * images[:, 0].sum((1, 2)), start, 5)[-1].images for s in (1e-4, 1e4)
    )
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)


# ---- selection ---------------------------------------------------------------------------------------------


def test_the_best_of_each_sample_is_kept_and_stays_as_it_was():
    """Rewards that peak at iterations 7 and 3 and fall later, while the noise moves on."""
    count = iter(range(100))

    def peaking(images, prompts):
        k = next(count)
        return (
            torch.tensor([-abs(k - 7.0), -abs(k - 3.0)])
            + 1e-3 * images[:, 0, 0, 0]
            - 1e-3 * images[:, 0, 0, 0].detach()
        )

    states = run(peaking, noise(), 15, settings={"lr": 0.1})
    last = states[-1]
    assert last.best_step.tolist() == [7, 3]
    for row, step in enumerate((7, 3)):
        assert torch.equal(last.best_images[row], states[step].images[row])
        assert torch.equal(last.best_latents[row], states[step].images[row])  # pictures are the noise here
        assert (last.best_latents[row] - states[-1].images[row]).abs().max() > 1e-2
    assert [state.improved.tolist() for state in states[:5]] == [[True, True]] * 4 + [[True, False]]
    assert torch.equal(states[2].best_images, states[2].images)  # earlier states didn't change


def test_best_of_n_keeps_the_best_of_fresh_noise():
    start = noise()
    states = run(lambda images, prompts: images.mean((1, 2, 3)), start, 20, optimizer="best-of-n")
    generator = seeded(7)
    drawn = torch.stack([start] + [torch.randn(start.shape, generator=generator) for _ in range(19)])
    means = drawn.mean((2, 3, 4))
    assert torch.equal(states[-1].best_step, means.argmax(0))
    torch.testing.assert_close(torch.stack([state.rewards for state in states]), means)
    assert states[-1].num_evaluations == 20


def test_a_search_with_several_candidates_a_sample():
    """Another method through the same protocol: it is told each candidate's reward and asked for more."""

    class RandomSearch(NoiseOptimizer):
        def __init__(self, problem, *, spread=0.3):
            super().__init__(problem)
            self.centre, self.spread, self.generator = problem.latents.clone(), spread, seeded(0)
            self.told = []

        def ask(self):
            shape = (len(self.centre), 4, *self.centre.shape[1:])
            steps = torch.randn(shape, generator=self.generator) * self.spread
            steps[:, 0] = 0
            self.asked = self.centre.unsqueeze(1) + steps
            return self.asked

        def tell(self, rewards, gradients=None):
            assert rewards.shape == (2, 4) and gradients is None
            self.told.append(rewards)
            self.centre = self.asked[torch.arange(2), rewards.argmax(1)]

    states = run(quadratic, noise(), 30, optimizer=RandomSearch, differentiable=False, settings={"spread": 0.2})
    rewards = torch.stack([state.rewards for state in states])
    assert (rewards.diff(dim=0) >= 0).all() and (rewards[-1] > rewards[0] + 1).all()
    assert states[-1].num_evaluations == 120
    torch.testing.assert_close(quadratic(states[-1].best_latents, None), states[-1].best_rewards)


# ---- a batch and its items ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PAPER, {}], ids=["paper", "default"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_batch_gives_what_its_items_give(settings, batch_size):
    def reward(images, prompts):
        return quadratic(images, prompts) * torch.tensor([1.0 + len(prompt) for prompt in prompts])

    start = noise(4)
    together = run(reward, start, 10, settings=settings, batch_size=batch_size)[-1]
    for row in range(4):
        alone = run(reward, start[row : row + 1], 10, settings=settings)[-1]
        torch.testing.assert_close(together.best_images[row], alone.best_images[0], rtol=0, atol=1e-5)
        assert together.best_step[row] == alone.best_step[0]


# ---- what goes wrong ---------------------------------------------------------------------------------------


def failing(at, rows=(0,), value=math.nan):
    count = iter(range(1000))

    def reward(images, prompts):
        values, k = quadratic(images, prompts), next(count)
        wrong = torch.zeros(len(images), dtype=torch.bool)
        wrong[[row for row in range(len(images)) if prompts[row][-1] in map(str, rows)]] = k >= at
        return values.masked_fill(wrong, value)

    return reward


def recorded(states):
    recorder = Recorder()
    for state in states:
        recorder.take(state)
    return recorder


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_ends_its_sample_with_the_best_before(value):
    start = noise(2)
    states = run(failing(7, value=value), start, 12, settings={"lr": 0.05})
    healthy = run(quadratic, start, 12, settings={"lr": 0.05})
    last = states[-1]
    assert len(states) == 12
    assert last.stopped == ("the reward at iteration 7 is not finite", None)
    rewards = torch.stack([state.rewards for state in states])
    assert torch.isfinite(rewards[:7]).all() and rewards[7:, 0].isnan().all() and torch.isfinite(rewards[7:, 1]).all()
    assert last.best_step[0] == rewards[:7, 0].argmax()
    assert torch.equal(last.best_images[0], healthy[last.best_step[0]].images[0])
    torch.testing.assert_close(last.best_images[1], healthy[-1].best_images[1])
    (trouble,) = recorded(states).troubles()
    assert trouble == "sample 0: the reward at iteration 7 is not finite; its result is the best before that"


def test_a_run_ends_with_its_last_sample():
    states = run(failing(7, rows=(0, 1)), noise(2), 50)
    assert len(states) == 8 and torch.isfinite(states[-1].best_rewards).all()


def test_a_gradient_that_is_not_finite_ends_its_sample():
    def reward(images, prompts):  # the square root's gradient at 0
        first = images[:, 0, 0, 0]
        return quadratic(images, prompts) + (0 * first).abs().sqrt() * torch.tensor([1.0, 0.0])

    states = run(reward, noise(2), 6)
    assert states[-1].stopped[0] == "the gradient at iteration 0 is not finite"
    assert torch.isfinite(states[-1].best_images).all()


def test_nothing_to_return_is_an_error():
    with pytest.raises(FloatingPointError, match="iteration 0 is not finite for any sample"):
        run(failing(0, rows=(0, 1)), noise(2), 5)
    states = run(failing(0), noise(2), 5)  # the other sample goes on
    assert states[-1].stopped[0] == "the reward at iteration 0 is not finite"
    assert torch.equal(states[-1].best_images[0], states[0].images[0])


def test_noise_whose_picture_is_not_finite_is_not_shown_to_the_reward():
    class Breaking(Identity):
        def __call__(self, latents, *, prompt_index=None):
            return latents.masked_fill((torch.tensor(prompt_index) == 1).view(-1, 1, 1, 1), math.nan)

    seen = []
    reward = CallableReward(lambda images, prompts: seen.append(images.detach()) or quadratic(images, prompts), True)
    objective = NoiseObjective(Breaking(), reward, ["a", "b"])
    evaluation = objective(noise(), [0, 1], with_gradient=True)
    assert evaluation.rewards.isnan().tolist() == [False, True]
    assert torch.isfinite(seen[0]).all()
    assert torch.isfinite(evaluation.gradients[0]).all() and evaluation.gradients[0].abs().max() > 0


def test_a_reward_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="has no gradient with respect to the pictures; takes a reward that has one"):
        run(lambda images, prompts: quadratic(images.detach(), prompts), noise(), 3)


# ---- the held-out reward -----------------------------------------------------------------------------------


def test_a_held_out_reward_that_stops_rising_ends_a_sample():
    count = iter(range(100))

    def held_out(images, prompts):  # rises up to iteration 5 for the first sample, for ever for the second
        k = next(count)
        return [float(min(k, 10 - k)) if prompt == "prompt 0" else float(k) for prompt in prompts]

    states = run(quadratic, noise(), 20, settings={"lr": 0.01}, monitor=held_out, monitor_patience=3)
    last = states[-1]
    assert last.stopped == ("the held-out reward has not risen since iteration 5", None)
    monitor = torch.stack([state.monitor for state in states])
    assert monitor[:9, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3, 2] and monitor[9:, 0].isnan().all()
    assert last.best_step[0] == 5 and torch.equal(last.best_images[0], states[5].images[0])
    assert last.best_step[1] == 19
    assert recorded(states).troubles() == []


# ---- the gradient that takes the sampler for the identity --------------------------------------------------


def test_jacobian_free_gradient_is_the_rewards_at_the_clean_latents():
    class Linear(Identity):
        def __call__(self, latents, *, prompt_index=None):
            self.recorded = latents.requires_grad
            return 3.0 * latents

    z = noise()
    for gradient, factor in (("full", 3.0), ("jacobian-free", 1.0)):
        sampler = Linear()
        objective = NoiseObjective(sampler, CallableReward(quadratic, True), ["a", "b"], gradient=gradient)
        evaluation = objective(z, [0, 1], with_gradient=True)
        torch.testing.assert_close(evaluation.gradients, -factor * (3.0 * z - 0.5))
        torch.testing.assert_close(evaluation.rewards, quadratic(3.0 * z, None))
        assert sampler.recorded == (gradient == "full")


# ---- the sheet's small benchmark ---------------------------------------------------------------------------


class FrozenGenerator(torch.nn.Module):
    """Noise (4, 16, 16) to pictures (3, 32, 32), and pictures to embeddings: random and frozen."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.make = torch.nn.Sequential(
                torch.nn.Conv2d(4, 32, 3, padding=1),
                torch.nn.GELU(),
                torch.nn.Upsample(scale_factor=2),
                torch.nn.Conv2d(32, 32, 3, padding=1),
                torch.nn.GELU(),
                torch.nn.Conv2d(32, 3, 3, padding=1),
                torch.nn.Sigmoid(),
            )
            self.embed = torch.nn.Sequential(
                torch.nn.Conv2d(3, 32, 5, stride=2, padding=2),
                torch.nn.GELU(),
                torch.nn.Conv2d(32, 64, 5, stride=2, padding=2),
                torch.nn.GELU(),
                torch.nn.AdaptiveAvgPool2d(2),
                torch.nn.Flatten(),
                torch.nn.Linear(256, 64),
            )
        self.requires_grad_(False)
        for module in (*self.make, *self.embed):
            if hasattr(module, "weight"):
                module.weight.mul_(2.5)  # as steep as a trained model

    def __call__(self, latents, *, prompt_index=None):
        return latents * 1.0

    def decode(self, latents):
        return self.make(latents)


def test_gradient_ascent_beats_best_of_n_by_far_on_a_random_generator():
    generator = FrozenGenerator()
    targets = torch.nn.functional.normalize(torch.randn(8, 64, generator=seeded(1)), dim=1)

    def reward(images, prompts):
        embedded = torch.nn.functional.normalize(generator.embed(images), dim=1)
        return 5.0 * (embedded * targets[[int(prompt) for prompt in prompts]]).sum(1)

    start = torch.randn(8, 4, 16, 16, generator=seeded(2))
    results = {}
    for name, optimizer, settings in (
        ("best of 50", "best-of-n", {}),
        ("paper", "gradient", PAPER),
        ("default", "gradient", NOISE_PRESETS["default"].optimizer),
        ("larger steps", "gradient", NOISE_PRESETS["sphere"].optimizer | {"lr": 0.03, "num_starts": 1}),
    ):
        objective = NoiseObjective(generator, CallableReward(reward, True), [str(i) for i in range(8)])
        states = list(NoiseRun(objective, make_noise_optimizer(optimizer, problem(start), settings), 50))
        results[name] = [state.best_rewards - states[0].rewards for state in states]
        assert (states[-1].norms - 1).abs().max() < 0.12
    gain = {name: [step.mean().item() for step in steps] for name, steps in results.items()}
    assert gain["paper"][-1] > 4 * gain["best of 50"][-1] > 0
    assert gain["default"][-1] > 4 * gain["best of 50"][-1]
    assert gain["larger steps"][24] > gain["paper"][-1]  # in half of the iterations


def test_subclasses_say_what_they_need():
    assert GradientAscent.needs_gradient and not BestOfN.needs_gradient
