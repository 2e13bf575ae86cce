"""Convex ReLU programs against cvxpy, closed forms, gradient descent and brute force over corners."""

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from trimtab.optim.solvers import (
    convex_relu,
    enumerate_patterns,
    improvement_bound,
    module_patterns,
    polish,
    relu_objective,
    sample_patterns,
    sampled_convex_relu,
)
from trimtab.optim.solvers.activation_patterns import ActivationPatterns, with_ones


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def optimum(X, y, patterns, beta, loss, epsilon=0.0, pairs=None) -> float:
    """The program as it stands, by an interior-point method."""
    A, D, columns = with_ones(X, True).numpy(), patterns.active.double().numpy(), X.shape[1]
    v, w = cp.Variable((len(D), A.shape[1])), cp.Variable((len(D), A.shape[1]))
    f = sum(cp.multiply(D[i], A @ (v[i] - w[i])) for i in range(len(D)))
    cones = [
        cp.multiply(2 * D[i] - 1, A @ block[i]) >= epsilon * cp.norm1(block[i, :columns])
        for i in range(len(D))
        for block in (v, w)
    ]
    spread = epsilon * cp.sum(cp.abs(D.T @ (v - w)[:, :columns]), axis=1)
    target = np.ones(0)
    if pairs is None:
        target = y.numpy()
    else:
        first, second = pairs.numpy().T
        f, spread, target = f[first] - f[second], spread[first] + spread[second], np.ones(len(pairs))
    if loss == "squared":
        value = cp.sum_squares(cp.abs(f - target) + spread) / 2
    elif loss == "hinge":
        value = cp.sum(cp.pos(1 - cp.multiply(target, f) + spread))
    else:
        value = cp.sum(cp.logistic(-cp.multiply(target, f) + spread))
    decay = beta * (cp.sum(cp.norm(v, axis=1)) + cp.sum(cp.norm(w, axis=1)))
    return float(cp.Problem(cp.Minimize(value + decay), cones).solve(solver="CLARABEL"))


@pytest.fixture(scope="module")
def scattered():
    """Points in the plane with labels and preferences that no linear function gives, and six patterns."""
    X = torch.randn(10, 2, generator=generator(), dtype=torch.float64)
    taste = X[:, 0] * X[:, 1]
    rows = torch.randint(10, (16, 2), generator=generator(1))
    rows = rows[rows[:, 0] != rows[:, 1]]
    pairs = torch.where((taste[rows[:, 0]] > taste[rows[:, 1]])[:, None], rows, rows.flip(1))
    return X, taste.sign(), pairs, sample_patterns(X, 6)


@pytest.mark.parametrize(
    ("loss", "epsilon", "paired", "inner"),
    [
        ("squared", 0.0, False, "cholesky"),
        ("hinge", 0.0, False, "cholesky"),
        ("logistic", 0.0, False, "cholesky"),
        ("logistic", 0.0, True, "cholesky"),
        ("hinge", 0.0, True, "cholesky"),
        ("squared", 0.0, False, "cg"),
        ("squared", 0.02, False, "cholesky"),
        ("hinge", 0.02, False, "cholesky"),
        ("logistic", 0.02, True, "cholesky"),
        pytest.param("logistic", 0.02, True, "cg", marks=pytest.mark.slow),
    ],
)
def test_matches_an_interior_point_method(scattered, loss, epsilon, paired, inner):
    X, labels, pairs, patterns = scattered
    y, pairs = (None, pairs) if paired else (labels, None)
    tuning = {"tolerance": 1e-6, "max_iterations": 1500}
    result = convex_relu(X, y, patterns, beta=0.1, loss=loss, pairs=pairs, epsilon=epsilon, inner=inner, **tuning)
    known = optimum(X, y, patterns, 0.1, loss, epsilon, pairs)
    assert 0.1 < known < 10  # neither fitted perfectly nor given up
    assert result.objective == pytest.approx(known, abs=1e-4)
    if epsilon == 0:
        assert result.lower_bound <= known + 1e-5 and result.objective >= known - 1e-5
        assert result.duality_gap < 1e-3
        network = relu_objective(result.to_module(), X, y, beta=0.1, loss=loss, pairs=pairs)
        assert network == pytest.approx(result.objective, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "paired", "iterations"),
    [
        ("squared", False, 500),
        ("logistic", False, 500),
        pytest.param("logistic", True, 500, marks=pytest.mark.slow),
        pytest.param("hinge", False, 1500, marks=pytest.mark.slow),
    ],
)
def test_block_coordinate_descent_reaches_the_optimum(scattered, loss, paired, iterations):
    X, labels, pairs, patterns = scattered
    y, pairs = (None, pairs) if paired else (labels, None)
    options = {"inner": "rbcd", "max_iterations": iterations, "tolerance": 1e-5}
    result = convex_relu(X, y, patterns, beta=0.1, loss=loss, pairs=pairs, **options)
    known = optimum(X, y, patterns, 0.1, loss, pairs=pairs)
    assert result.objective == pytest.approx(known, abs=1e-4) and result.lower_bound <= known + 1e-5
    assert result.num_inner_iterations >= len(patterns) * result.num_iterations


def test_acceleration_takes_fewer_iterations(scattered):
    X, y, _, patterns = scattered
    options = {"beta": 0.1, "loss": "hinge", "max_iterations": 600, "tolerance": 1e-5}
    plain, mixed = (convex_relu(X, y, patterns, acceleration=memory, **options) for memory in (0, 10))
    assert mixed.converged and mixed.num_iterations < 0.7 * plain.num_iterations


def sine():
    X = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    return X, torch.sin(3 * X[:, 0])


def trained(X, y, width, beta, steps, seed, loss="squared"):
    """A network by full-batch Adam, as one would train it."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(X.shape[1], width), nn.ReLU(), nn.Linear(width, 1, bias=False)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        f = module(X)[:, 0]
        value = (f - y).square().sum() / 2 if loss == "squared" else nn.functional.softplus(-y * f).sum()
        (value + beta / 2 * sum(p.square().sum() for p in module.parameters())).backward()
        optimizer.step()
    return module


def test_all_patterns_give_the_networks_global_optimum():
    """Two columns, n rows: 2 n patterns, one of them active nowhere. Gradient descent ends above, narrow or wide."""
    X, y = sine()
    patterns = enumerate_patterns(X)
    assert patterns.complete and len(patterns) == 2 * 12 - 1
    assert improvement_bound(patterns, 12) == 0.0
    result = convex_relu(X, y, patterns, beta=0.01)
    assert result.duality_gap < 1e-4
    network = result.to_module()
    assert relu_objective(network, X, y, beta=0.01) == pytest.approx(result.objective, abs=1e-9)
    assert (network(X)[:, 0] - y).square().mean() < 1e-2
    wide = [relu_objective(trained(X, y, 50, 0.01, 1000, seed), X, y, beta=0.01) for seed in range(1)]
    narrow = [relu_objective(trained(X, y, 4, 0.01, 600, seed), X, y, beta=0.01) for seed in range(3)]
    assert result.lower_bound <= min(wide + narrow)
    assert result.objective == pytest.approx(min(wide), rel=5e-2) and max(narrow) > 1.2 * result.objective


@pytest.mark.parametrize(("rows", "columns"), [(7, 2), (8, 3), (6, 4)])
def test_counts_of_patterns_are_covers(rows, columns):
    """2 sum_{k < d} C(n-1, k) cells of n hyperplanes in general position through the origin of R^d."""
    X = torch.randn(rows, columns, generator=generator(), dtype=torch.float64)
    patterns = enumerate_patterns(X, bias=False)
    count = 2 * sum(math.comb(rows - 1, k) for k in range(columns))
    nowhere = 1  # -h of the pattern that is active everywhere, if there is one
    assert len(patterns) in (count, count - nowhere)
    assert torch.equal(patterns.active, (X @ patterns.normals.T >= 0).T)
    sampled = sample_patterns(X, 1000, bias=False, max_draws=20_000)
    assert {tuple(row.tolist()) for row in sampled.active} <= {tuple(row.tolist()) for row in patterns.active}
    assert len(sampled) >= 0.9 * len(patterns)


@pytest.mark.parametrize("beta", [0.5, 3.0, 100.0])
def test_one_neuron_is_a_soft_threshold(beta):
    x = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 2.5, 3.5], dtype=torch.float64)
    patterns = ActivationPatterns(torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 1, dtype=torch.float64))
    result = convex_relu(x, y, patterns, beta=beta, bias=False, tolerance=1e-9)
    slope = max(0.0, float(x[:, 0] @ y) - beta) / float(x.square().sum())
    assert float(result.v[0, 0]) == pytest.approx(slope, abs=1e-6) and float(result.w.abs().max()) < 1e-9
    assert float(result.to_module()(x)[1].detach()) == pytest.approx(slope, abs=1e-6)
    assert result.duality_gap < 1e-6


def test_convergence_is_linear(scattered):
    """With rho kept, residuals fall by a constant factor: to half their digits in about half the iterations."""
    X, y, _, patterns = scattered
    result = convex_relu(X, y, patterns, beta=0.1, rho=0.3, tolerance=1e-10, max_iterations=6000, acceleration=0)
    assert result.converged
    first = next(k for k, residual in enumerate(result.residuals) if residual < 1e-6)
    assert first > 20 and result.num_iterations < 2.6 * first


@pytest.mark.slow
def test_all_patterns_against_many_networks():
    """Objective within 1e-3 of the best of four wide networks and below every narrow one."""
    X, y = sine()
    result = convex_relu(X, y, enumerate_patterns(X), beta=0.01, tolerance=1e-8)
    wide = [relu_objective(trained(X, y, 50, 0.01, 4000, seed), X, y, beta=0.01) for seed in range(4)]
    narrow = [relu_objective(trained(X, y, 4, 0.01, 4000, seed), X, y, beta=0.01) for seed in range(8)]
    assert result.objective == pytest.approx(min(wide), abs=1e-3)
    assert result.objective <= min(narrow) + 1e-6 and result.duality_gap < 1e-5
    assert result.objective == pytest.approx(0.1676, abs=1e-3)  # of an independent prototype


def test_polish_is_never_worse():
    X = torch.randn(40, 4, generator=generator(), dtype=torch.float64)
    y = torch.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2]
    better = 0
    for seed in range(5):
        module = trained(X, y, 12, 0.1, 150, seed)
        result = polish(module, X, y, beta=0.1, max_iterations=150)
        assert result.before == pytest.approx(relu_objective(module, X, y, beta=0.1))
        assert result.after == pytest.approx(relu_objective(result.module, X, y, beta=0.1), abs=1e-9)
        assert result.after <= result.before
        better += result.after < result.before - 1e-3
    assert better >= 3


def test_polish_that_stops_at_once_keeps_the_network():
    X, y = sine()
    module = trained(X, y, 10, 0.01, 400, 0).float()
    result = polish(module, X.float(), y.float(), beta=0.01, max_iterations=1, rho=1e-6)
    assert result.after <= result.before and result.module[0].weight.dtype == torch.float32
    assert torch.allclose(result.module(X.float()), module(X.float()), atol=1e-5)


def test_polish_keeps_the_last_bias_and_fits_pairs(scattered):
    X, y, pairs, _ = scattered
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 1)).double()
    nn.init.constant_(module[2].bias, 0.7)
    result = polish(module, X, y, beta=0.05, loss="logistic", max_iterations=300)
    assert result.module[2].bias.item() == pytest.approx(0.7) and result.after < result.before
    assert result.after <= result.program.objective + 1e-8
    ranked = polish(module, X, None, pairs=pairs, beta=0.05, loss="logistic", max_iterations=300)
    f = ranked.module(X)[:, 0]
    assert ranked.after < ranked.before and (f[pairs[:, 0]] > f[pairs[:, 1]]).double().mean() > 0.85


def test_robust_margin_holds_at_every_corner():
    """The worst of the box's 2^d corners is y f - epsilon ||T||_1: the cones keep every neuron's sign in the box."""
    d, epsilon = 6, 0.1
    X = torch.randn(5, d, generator=generator(3), dtype=torch.float64)
    y = torch.where(torch.arange(5) % 2 == 0, 1.0, -1.0).double()
    patterns = sample_patterns(X, 6, epsilon=epsilon, generator=generator(1))
    options = {"beta": 0.02, "loss": "hinge", "tolerance": 1e-8, "max_iterations": 700}
    corners = epsilon * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)

    def worst(module):
        return (y[:, None] * module(X[:, None] + corners)[..., 0]).amin(1)

    robust = convex_relu(X, y, patterns, epsilon=epsilon, **options)
    assert robust.violation < 1e-6
    spread = (patterns.active.double().T @ (robust.v - robust.w)[:, :d]).abs().sum(1)
    network = robust.to_module()
    promised = y * network(X)[:, 0] - epsilon * spread
    assert spread.max() > 0.1 and torch.allclose(worst(network), promised, atol=1e-6)
    plain = convex_relu(X, y, patterns, **options)
    spread = (patterns.active.double().T @ (plain.v - plain.w)[:, :d]).abs().sum(1)
    promised_plain = y * plain.to_module()(X)[:, 0] - epsilon * spread
    assert (worst(plain.to_module()) < promised_plain - 1e-3).any()  # without the cones signs flip
    assert worst(network).clamp_max(1).sum() > worst(plain.to_module()).clamp_max(1).sum()


@pytest.mark.parametrize("loss", ["squared", "hinge", "logistic"])
def test_sampled_program_is_the_lasso(scattered, loss):
    X, y, _, _ = scattered
    result = sampled_convex_relu(X, y, 60, beta=0.1, loss=loss, rho=0.1, max_iterations=4000, tolerance=1e-7)
    features = (with_ones(X, True) @ result.normals.T).clamp_min(0).numpy()
    alpha = cp.Variable(60)
    f = features @ alpha
    losses = {
        "squared": cp.sum_squares(f - y.numpy()) / 2,
        "hinge": cp.sum(cp.pos(1 - cp.multiply(y.numpy(), f))),
        "logistic": cp.sum(cp.logistic(-cp.multiply(y.numpy(), f))),
    }
    known = cp.Problem(cp.Minimize(losses[loss] + 0.1 * cp.norm1(alpha))).solve(solver="CLARABEL")
    assert result.objective == pytest.approx(known, abs=1e-4)
    assert result.lower_bound <= known + 1e-6 and result.duality_gap < 1e-2
    assert relu_objective(result.to_module(), X, y, beta=0.1, loss=loss) == pytest.approx(result.objective, abs=1e-9)


def test_more_random_features_are_never_worse_than_the_global_optimum():
    X, y = sine()
    best = convex_relu(X, y, enumerate_patterns(X), beta=0.01).lower_bound
    values = [sampled_convex_relu(X, y, num, beta=0.01, tolerance=1e-4).objective for num in (20, 300)]
    assert values[0] > values[1] >= best and values[1] < 1.1 * best


def test_bound_on_one_more_pattern_holds():
    """Of many runs with 40 draws on three rows, a further pattern helps less often than the bound says."""
    X = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    helped, runs = 0, 8
    for seed in range(runs):
        few = sample_patterns(X, 100, bias=False, max_draws=20, generator=generator(seed))
        one = sample_patterns(X, 1, bias=False, max_draws=1, generator=generator(100 + seed))
        more = ActivationPatterns(
            torch.unique(torch.cat([few.active, one.active]), dim=0), few.normals[:1].expand(len(few) + 1, -1)
        )
        new = len(more.active) > len(few)
        helped += new
    bound = improvement_bound(few, 3, confidence=0.8)
    assert bound == pytest.approx(min(1.0, 4 / (0.2 * 21), 2 * (4 - math.log(0.2)) / 20)) and helped / runs <= bound
    many = ActivationPatterns(few.active, few.normals, draws=10_000)
    assert improvement_bound(many, 3, confidence=0.8) == pytest.approx(2 * (4 - math.log(0.2)) / 10_000)


@pytest.mark.parametrize(("rows", "draws", "confidence"), [(3, 20, 0.8), (10, 200, 0.95), (40, 5000, 0.99)])
def test_bound_is_one_of_the_scenario_approach(rows, draws, confidence):
    """Campi and Garatti's tail of n + 1 variables: P(violation > psi) <= sum_{i <= n} C(N, i) psi^i (1-psi)^(N-i).

    The bound of the paper is looser by a constant, so its tail is below the confidence's complement, and not by far.
    """
    drawn = ActivationPatterns(torch.ones(1, rows, dtype=torch.bool), torch.ones(1, 2, dtype=torch.float64), draws)
    psi = improvement_bound(drawn, rows, confidence=confidence)
    assert 0 < psi < 1
    assert binom.cdf(rows, draws, psi) <= 1 - confidence < binom.cdf(rows, draws, psi / 4)


@pytest.mark.parametrize("kind", ["column twice", "column of zeros", "fewer rows than columns"])
@pytest.mark.parametrize("inner", ["cholesky", "cg"])
def test_singular_systems(kind, inner):
    """F^T F and X^T X are singular; ADMM's own identity keeps its system solvable."""
    X = torch.randn(8, 2, generator=generator(), dtype=torch.float64)
    y = X[:, 0].abs()
    X = {
        "column twice": torch.cat([X, X[:, :1]], 1),
        "column of zeros": torch.cat([X, 0 * X[:, :1]], 1),
        "fewer rows than columns": torch.cat([X, torch.randn(8, 10, generator=generator(1), dtype=torch.float64)], 1),
    }[kind]
    patterns = sample_patterns(X, 4)
    again = torch.cat([patterns.active, patterns.active[:2]]), torch.cat([patterns.normals, patterns.normals[:2]])
    result = convex_relu(X, y, ActivationPatterns(*again), beta=0.1, inner=inner, max_iterations=600)
    assert result.objective == pytest.approx(optimum(X, y, patterns, 0.1, "squared"), abs=1e-4)


def test_inner_solvers_agree_where_the_factor_is_over_neurons():
    """More rows than unknowns: the factor is the primal one, not that of the matrix inversion lemma."""
    X = torch.randn(60, 2, generator=generator(), dtype=torch.float64)
    y = X[:, 0].abs()
    patterns = sample_patterns(X, 4)
    primal = convex_relu(X, y, patterns, beta=0.1, rho=1.0, max_iterations=1200)
    cg = convex_relu(X, y, patterns, beta=0.1, rho=1.0, inner="cg", max_iterations=50)
    assert primal.history[:50] == pytest.approx(cg.history, rel=1e-5) and cg.num_inner_iterations > 50
    assert primal.objective == pytest.approx(optimum(X, y, patterns, 0.1, "squared"), abs=1e-4)


def test_data_in_float32_and_duplicates(scattered):
    """A row twice counts twice: the same as its loss doubled, here checked by the interior-point method."""
    X, y, _, _ = scattered
    twice, labels = torch.cat([X, X[:3]]), torch.cat([y, y[:3]])
    patterns = sample_patterns(twice.float(), 6)
    assert len({tuple(row.tolist()) for row in patterns.active}) == 6
    result = convex_relu(twice.float(), labels.float(), patterns, beta=0.1, loss="logistic", max_iterations=600)
    known = optimum(twice.float().double(), labels, patterns, 0.1, "logistic")
    assert result.objective == pytest.approx(known, abs=1e-4)


def test_strong_decay_gives_the_zero_network(scattered):
    X, y, _, patterns = scattered
    result = convex_relu(X, y, patterns, beta=1e3)
    assert not result.v.any() and not result.w.any()
    assert not result.to_module()(X).detach().any() and result.duality_gap < 1e-6


def test_module_patterns_leave_out_what_is_never_active():
    X, _ = sine()
    module = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0], [2.0], [1.0]]))
        module[0].bias.copy_(torch.tensor([0.1, 0.2, -5.0]))
    assert len(module_patterns(module, X.float())) == 1
    with torch.no_grad():
        module[0].bias.fill_(-5)
    with pytest.raises(ValueError, match="no neuron that is active"):
        polish(module, X.float(), X[:, 0].float(), beta=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.ones(10)}, r"`y` has the values \[1.0\]; 'logistic' takes -1 and 1, both"),
        ({"y": torch.ones(3)}, r"`y` has shape \(3,\)"),
        ({"beta": 0.0}, "`beta` is 0.0"),
        ({"rho": -1.0}, "`rho` is -1.0"),
        ({"loss": "l1"}, "`loss` is 'l1'"),
        ({"inner": "lbfgs"}, "`inner` is 'lbfgs'"),
        ({"inner": "rbcd", "epsilon": 0.02}, "`inner` is 'rbcd'"),
        ({"acceleration": -1}, "`acceleration` is -1"),
        ({"epsilon": -0.1}, "`epsilon` is -0.1"),
        ({"epsilon": 10.0}, "`epsilon` is 10; no pattern is constant over boxes larger than"),
        ({"pairs": torch.tensor([[0, 1]])}, "`pairs` takes y=None"),
        ({"y": None, "pairs": torch.tensor([[0, 10]])}, "`pairs` has rows 0 to 10"),
        ({"y": None, "pairs": torch.tensor([[2, 2]])}, "a row preferred to itself"),
        ({"X": torch.full((10, 2), math.nan)}, "`X` has entries that are not finite"),
        ({"X": torch.randn(5, 3), "y": torch.ones(5)}, "`patterns` has shapes|`y` has the values"),
        ({"initial": torch.zeros(2, 1, 1)}, "`initial` has shape"),
    ],
)
def test_bad_input_is_named(scattered, changes, message):
    X, y, _, patterns = scattered
    arguments = {"X": X, "y": y, "patterns": patterns, "beta": 0.1, "loss": "logistic", **changes}
    with pytest.raises(ValueError, match=message):
        convex_relu(**arguments)


def test_other_networks_are_named():
    X, y = sine()
    with pytest.raises(ValueError, match="takes nn.Sequential"):
        polish(nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)), X, y, beta=0.1)
    with pytest.raises(ValueError, match=r"`module` takes \(n, 3\)"):
        polish(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), X, y, beta=0.1)
    with pytest.raises(ValueError, match="more than 10 activation patterns"):
        enumerate_patterns(X, limit=10)
    with pytest.raises(TypeError, match="`X` is torch.int64"):
        sample_patterns(torch.ones(3, 2, dtype=torch.long), 4)
    drawn = module_patterns(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double(), X)
    with pytest.raises(ValueError, match="were not drawn"):
        improvement_bound(drawn, 12)
