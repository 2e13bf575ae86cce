"""Optimistic mirror descent against its bounds, hand steps, scipy, and exact duality gaps."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from trimtab.optim.search import (
    Ball,
    Box,
    DynamicMirrorDescent,
    OptimisticMirrorDescent,
    RegretTracker,
    Simplex,
    solve_saddle,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unit_ball(d=10):
    return Ball(1.0, torch.zeros(d))


def moving_target(rounds, noise, drift, d=10, seed=0):
    """Noisy targets (T, d) of ||x - c||^2 / 2 and what they are about: outside of the ball, turning."""
    g = seeded(seed)
    direction = torch.randn(d, generator=g).double()
    centres = (2 * direction / direction.norm()).repeat(rounds, 1)
    turn = torch.arange(rounds).double()
    centres[:, 0] += drift * torch.sin(turn)
    centres[:, 1] += drift * torch.cos(turn)
    return centres + noise / math.sqrt(d) * torch.randn(rounds, d, generator=g).double(), centres


def play(player, noisy, centres):
    """The expected losses' regret against the best fixed point, after each round."""
    points = []
    for c in noisy:
        x = player.predict()
        player.update(x - c)
        points.append(x)
    paid = 0.5 * (torch.stack(points) - centres).square().sum(1).cumsum(0)
    rounds = torch.arange(1, len(noisy) + 1).double()
    mean = centres.cumsum(0) / rounds[:, None]
    best = mean / mean.norm(dim=1, keepdim=True).clamp_min(1)  # of the ball
    squares = centres.square().sum(1).cumsum(0)
    lowest = 0.5 * (squares - 2 * rounds * (mean * best).sum(1) + rounds * best.square().sum(1))
    return paid - lowest


@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_the_bound_of_the_convex_case_holds(noise, drift):
    rounds = 1000
    noisy, centres = moving_target(rounds, noise, drift)
    lipschitz = 1 + float(noisy.norm(dim=1).max())
    regret = play(OptimisticMirrorDescent(unit_ball(), lipschitz=lipschitz, smoothness=1.0), noisy, centres)[-1]
    variance, variation = noise**2 * rounds, float((centres[1:] - centres[:-1]).square().sum()) + (1 + 2 + drift) ** 2
    bound = 5 * math.sqrt(10) * 4 + 2.5 * math.sqrt(5) * 2 * lipschitz
    bound += 2 * (5 * math.sqrt(2) * math.sqrt(variance) + 5 * math.sqrt(variation))
    assert regret < 0.5 * bound  # its constants are loose
    assert noise == 0 or regret > 0


def test_without_noise_and_drift_regret_does_not_grow():
    player = OptimisticMirrorDescent(unit_ball(), lipschitz=3.0, smoothness=1.0)
    regret = play(player, *moving_target(3000, 0.0, 0.0))
    assert regret[999] == pytest.approx(regret[-1].item(), abs=1e-6) and 0 < regret[-1] < 10


def test_a_hint_of_zero_is_plain_descent():
    noisy, _ = moving_target(50, 1.0, 1.0)
    player = OptimisticMirrorDescent(unit_ball(), lipschitz=6.0, smoothness=1.0)
    x, squares = torch.zeros(10).double(), 0.0
    for c in noisy:
        assert torch.allclose(player.predict(torch.zeros(10)), x, atol=1e-12)
        player.update(x - c)
        moved = x - 2 / math.sqrt(40 + 4 * 36 + squares) * (x - c)
        squares += float((x - c).square().sum())
        x = moved / max(1.0, float(moved.norm()))


def test_two_steps_by_hand():
    player = OptimisticMirrorDescent(Ball(1.0, torch.zeros(2)), lipschitz=1.0)
    assert player.predict().tolist() == [0, 0] and player.step_size == 1.0
    player.update(torch.tensor([1.0, 0.0]))
    assert player.centre.tolist() == [-1.0, 0.0] and player.step_size == pytest.approx(2 / math.sqrt(5))
    assert player.predict().tolist() == pytest.approx([-1.0, 0.0])


def test_the_entropic_step_is_the_softmax_formula():
    player, total, last, variation = OptimisticMirrorDescent(Simplex(4), lipschitz=2.0), 0.0, 0.0, 0.0
    for g in torch.randn(30, 4, generator=seeded(0)).clamp(-2, 2).double():
        step = math.sqrt(math.log(4)) / math.sqrt(4 + variation)
        x = player.predict()
        logits = (-step * (total + last * torch.ones(4))).double()
        expected = (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()
        assert torch.allclose(x, expected, atol=1e-12) and abs(x.sum().item() - 1) < 1e-12
        player.update(g)
        variation += float((g - last).abs().max()) ** 2
        total, last = total + g, g


def test_weights_that_underflow_come_back():
    player = OptimisticMirrorDescent(Simplex(2), lipschitz=1.0, step_size=10.0)
    for sign in (1.0, -1.0):
        for _ in range(100):
            x = player.predict()
            player.update(torch.tensor([sign, 0.0]))
        assert x[0] < 1e-30 if sign > 0 else True
    assert player.predict().tolist()[0] == pytest.approx(1.0, abs=1e-3)


def rotating(rounds):
    """Strongly convex losses ||x - c||^2 / 2 whose target turns on a circle inside of the ball."""
    turn = 2 * torch.arange(rounds).double()  # the last gradient is a poor guess of the next
    centres = torch.zeros(rounds, 10).double()
    centres[:, 0], centres[:, 1] = 0.5 * torch.sin(turn), 0.5 * torch.cos(turn)
    return centres


def strongly_convex_ratio(rounds):
    centres = rotating(rounds)
    player = OptimisticMirrorDescent(unit_ball(), lipschitz=1.5, rule="strongly_convex", strong_convexity=1.0)
    regret = play(player, centres, centres)
    steps = [10**k for k in range(3, 6) if 10**k <= rounds]
    return [regret[step - 1].item() / math.log(step) for step in steps]


def test_strongly_convex_regret_grows_as_the_logarithm():
    ratios = strongly_convex_ratio(10_000)
    assert max(ratios) <= 2 * min(ratios) and min(ratios) > 0
    centres = rotating(10_000)
    square_root = play(OptimisticMirrorDescent(unit_ball(), lipschitz=1.5), centres, centres)
    assert square_root[-1] > 5 * ratios[-1] * math.log(10_000)  # the convex rule does worse


@pytest.mark.slow
def test_the_logarithm_holds_to_a_hundred_thousand_rounds():
    ratios = strongly_convex_ratio(100_000)
    assert len(ratios) == 3 and max(ratios) <= 2 * min(ratios)


def test_exp_concave_regret_grows_slower_than_the_square_root():
    """Squared losses of one direction a round: not strongly convex, but exp-concave."""
    g, d, lipschitz = seeded(3), 4, 1.7
    features = torch.nn.functional.normalize(torch.randn(8000, d, generator=g).double(), dim=1)
    labels = features @ torch.tensor([0.03, -0.04, 0.02, 0.01]).double()
    labels += 1.5 * (2 * torch.rand(8000, generator=g).double() - 1)
    ball = Ball(0.1, torch.zeros(d))
    player = OptimisticMirrorDescent(ball, lipschitz=lipschitz, rule="exp_concave", alpha=lipschitz**-2)
    paid = []
    for a, b in zip(features, labels, strict=True):
        x = player.predict()
        paid.append(float(0.5 * (a @ x - b) ** 2))
        player.update((a @ x - b) * a)

    def best(count):
        A, b = features[:count].numpy(), labels[:count].numpy()
        inside = {"type": "ineq", "fun": lambda x: 0.01 - (x**2).sum()}
        mean = lambda x: 0.5 * ((A @ x - b) ** 2).mean()  # noqa: E731
        return count * minimize(mean, np.zeros(d), method="SLSQP", constraints=inside, options={"ftol": 1e-14}).fun

    early, late = (sum(paid[:count]) - best(count) for count in (500, 8000))
    assert 0 < early < late < 3 * early  # the square root would give 4


@pytest.mark.parametrize("domain", [Ball(1.0, torch.tensor([0.2, 0.0, -0.1])), Box(-torch.ones(3), torch.ones(3) / 2),
                                    Simplex(3)])  # fmt: skip
def test_exp_concave_steps_are_the_projections_of_their_metric(domain):
    player = OptimisticMirrorDescent(domain, lipschitz=3.0, rule="exp_concave", alpha=2.0)
    beta, metric = 0.5 * min(1 / (12 * domain.diameter), 2.0), None
    metric = (1 + beta / 2 * 9) * torch.eye(3).double()
    centre, last = domain.start(), torch.zeros(3).double()
    if isinstance(domain, Simplex):
        sets = {"constraints": {"type": "eq", "fun": lambda x: x.sum() - 1}, "bounds": [(0, None)] * 3}
    elif isinstance(domain, Box):
        sets = {"bounds": [(-1, 0.5)] * 3}
    else:
        middle = domain.center.numpy()
        sets = {"constraints": {"type": "ineq", "fun": lambda x: 1 - ((x - middle) ** 2).sum()}}

    def argmin(g):
        m, c, v = metric.numpy(), centre.numpy(), g.numpy()
        value = lambda x: v @ x + 0.5 * (x - c) @ m @ (x - c)  # noqa: E731
        found = minimize(value, c, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500}, **sets)
        return torch.from_numpy(found.x)

    for g in 3 * torch.nn.functional.normalize(torch.randn(6, 3, generator=seeded(1)).double(), dim=1):
        assert torch.allclose(player.predict(), argmin(last), atol=1e-5)
        player.update(g)
        centre, last = argmin(g), g
        metric = metric + beta / 2 * torch.outer(g, g)
        assert torch.allclose(player.centre, centre, atol=1e-5)
        centre = player.centre  # the oracle's errors don't add up


@pytest.mark.parametrize("domain", [Ball(2.0, torch.ones(3)), Box(-torch.ones(3), 2 * torch.ones(3)), Simplex(3)])
def test_projections_and_lowest_values(domain):
    g = seeded(5)
    points = torch.stack([domain.project(3 * torch.randn(3, generator=g).double()) for _ in range(300)])
    for _ in range(10):
        x, slope = 3 * torch.randn(3, generator=g).double(), torch.randn(3, generator=g).double()
        nearest = domain.project(x)
        assert torch.allclose(domain.project(nearest), nearest, atol=1e-12)
        assert (((x - nearest) * (points - nearest)).sum(1) <= 1e-9).all()  # what makes it the nearest
        lowest = domain.lowest(slope)
        assert lowest <= (points @ slope).min() + 1e-12
        assert torch.allclose(lowest, slope @ domain.project(-1e9 * slope), atol=1e-5)
    assert torch.cdist(points, points).max() <= domain.diameter + 1e-12


def dynamic_regret(player, centres):
    paid = 0.0
    for c in centres:
        x = player.predict()
        paid += 0.5 * float((x - c).square().sum())
        player.update(x - c)
    return paid


def test_an_ensemble_follows_a_target_that_jumps_or_drifts():
    jumps = torch.randn(6, 10, generator=seeded(2)).double().repeat_interleave(150, 0)
    drift = torch.randn(4, 10, generator=seeded(3)).double()
    drift = torch.stack([drift[i] + (drift[i + 1] - drift[i]) * s for i in range(3) for s in torch.linspace(0, 1, 300)])
    for centres in (0.5 * torch.nn.functional.normalize(jumps, dim=1), 0.3 * torch.nn.functional.normalize(drift)):
        options = {"lipschitz": 1.5, "smoothness": 1.0}
        ensemble = dynamic_regret(DynamicMirrorDescent(unit_ball(), horizon=900, **options), centres)
        alone = [
            dynamic_regret(OptimisticMirrorDescent(unit_ball(), step_size=player.fixed, **options), centres)
            for player in DynamicMirrorDescent(unit_ball(), horizon=900, **options).players
        ]
        assert len(alone) >= 3 and ensemble <= 1.5 * min(alone) + 2
        assert ensemble < 0.5 * max(alone)


def gap(A, x, y):
    return float((A.T @ x).max() - (A @ y).min())


def test_a_matrix_game_ends_at_the_value_of_its_linear_program():
    A = (2 * torch.rand(6, 5, generator=seeded(4)) - 1).double()
    found = solve_saddle(lambda x, y: A @ y, lambda x, y: A.T @ x, Simplex(6), Simplex(5), steps=2000)
    exact = gap(A, found.x_average, found.y_average)
    assert found.gap_history[-1] == pytest.approx(exact, abs=1e-9)
    c = np.r_[np.zeros(6), 1.0]  # minimize v subject to A^T x <= v
    program = linprog(
        c, np.c_[A.T.numpy(), -np.ones(5)], np.zeros(5), [[1] * 6 + [0]], [1], [(0, None)] * 6 + [(None,) * 2]
    )
    assert float(found.x_average @ A @ found.y_average) == pytest.approx(program.fun, abs=exact + 1e-9)
    plain = solve_saddle(lambda x, y: A @ y, lambda x, y: A.T @ x, Simplex(6), Simplex(5), steps=2000, optimistic=False)
    assert exact < 0.2 * plain.gap_history[-1]


def test_only_optimistic_players_converge_in_their_last_points():
    A = (2 * torch.rand(10, 10, generator=seeded(0)) - 1).double()
    gaps = []
    for optimistic in (True, False):
        options = {"steps": 5000, "step_size": 0.5, "optimistic": optimistic}
        found = solve_saddle(lambda x, y: A @ y, lambda x, y: A.T @ x, Simplex(10), Simplex(10), **options)
        gaps.append(gap(A, found.x_last, found.y_last))
    assert gaps[0] < 0.1 and gaps[1] > 0.5


def test_a_game_ends_when_told():
    A = torch.eye(2).double()
    played = []
    found = solve_saddle(
        lambda x, y: A @ y, lambda x, y: A.T @ x, Simplex(2), Simplex(2), steps=50,
        callback=lambda step, x, y: played.append(x) or step == 6,
    )  # fmt: skip
    assert found.rounds == len(played) == len(found.gap_history) == 7 and torch.equal(found.x_last, played[-1])


def test_a_player_goes_on_from_its_state():
    noisy, _ = moving_target(40, 1.0, 1.0)
    makers = [
        lambda: OptimisticMirrorDescent(unit_ball(), lipschitz=6.0),
        lambda: OptimisticMirrorDescent(unit_ball(), lipschitz=6.0, rule="exp_concave", alpha=1.0),
        lambda: OptimisticMirrorDescent(Simplex(10), lipschitz=6.0),
        lambda: DynamicMirrorDescent(unit_ball(), lipschitz=6.0, smoothness=1.0, horizon=40),
    ]
    for make in makers:
        whole, first, second = make(), make(), make()
        for c in noisy[:20]:
            for player in (whole, first):
                player.update(player.predict() - c)
        second.load_state_dict(first.state_dict())
        for c in noisy[20:]:
            x, y = whole.predict(), second.predict()
            assert torch.equal(x, y)
            whole.update(x - c)
            second.update(y - c)
        with pytest.raises(ValueError, match="`state`"):
            make().load_state_dict({})


def test_regret_is_against_the_best_fixed_point():
    g = torch.randn(50, 4, generator=seeded(6)).double()
    x = torch.softmax(torch.randn(50, 4, generator=seeded(7)).double(), 1)
    tracker = RegretTracker(Simplex(4))
    assert tracker.regret() == 0.0
    for a, b in zip(g, x, strict=True):
        tracker.record(a, b)
    expected = float((g * x).sum() - g.sum(0).min())
    assert tracker.regret() == pytest.approx(expected)
    assert tracker.regret(torch.eye(4)[g.sum(0).argmin()].double()) == pytest.approx(expected)


def test_bad_input_is_named():
    ball = unit_ball()
    for options, message in (
        ({"lipschitz": 0.0}, "`lipschitz`"),
        ({"lipschitz": 1.0, "smoothness": -1.0}, "`smoothness`"),
        ({"lipschitz": 1.0, "mirror": "entropic"}, "`mirror`"),
        ({"lipschitz": 1.0, "rule": "strongly_convex", "strong_convexity": 0.0}, "`strong_convexity`"),
        ({"lipschitz": 1.0, "rule": "newton"}, "`rule`"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimisticMirrorDescent(ball, **options)
    for options in ({"rule": "strongly_convex"}, {"rule": "exp_concave"}):
        with pytest.raises(TypeError, match="takes a number"):
            OptimisticMirrorDescent(ball, lipschitz=1.0, **options)
    for make in (OptimisticMirrorDescent, DynamicMirrorDescent):
        with pytest.raises(TypeError, match="`domain`"):
            make(torch.zeros(3), lipschitz=1.0)
        player = make(ball, lipschitz=1.0)
        with pytest.raises(RuntimeError, match="predict"):
            player.update(torch.zeros(10))
        player.predict()
        with pytest.raises(ValueError, match="`gradient`"):
            player.update(torch.zeros(3))
        with pytest.raises(ValueError, match="finite"):
            player.update(torch.full((10,), float("nan")))
        player.update(torch.zeros(10))
        with pytest.raises(RuntimeError, match="predict"):
            player.update(torch.zeros(10))
    with pytest.raises(ValueError, match="4096"):
        OptimisticMirrorDescent(Ball(1.0, torch.zeros(5000)), lipschitz=1.0, rule="exp_concave", alpha=1.0)
    with pytest.raises(ValueError, match="`low` and `high`"):
        Box(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="`n`"):
        Simplex(1)
    with pytest.raises(ValueError, match="`radius`"):
        Ball(0.0, torch.zeros(2))


def test_a_gradient_beyond_its_bound_is_told_once_or_adapted_to():
    player = OptimisticMirrorDescent(unit_ball(), lipschitz=1.0)
    player.predict()
    with pytest.warns(UserWarning, match="`lipschitz`"):
        player.update(torch.ones(10))
    player.predict()
    player.update(torch.ones(10))
    growing = OptimisticMirrorDescent(unit_ball(), lipschitz=1.0, adaptive_lipschitz=True)
    growing.predict()
    growing.update(torch.ones(10))
    assert growing.lipschitz == pytest.approx(math.sqrt(10))
    assert growing.centre.norm() == pytest.approx(1.0)  # moved by the step of its round
