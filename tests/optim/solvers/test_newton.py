"""Newton's method with gradient-normalized smoothness against closed forms, scipy and the paper's inequalities."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.autograd.functional import hessian as hessian_of
from torch.nn.functional import cross_entropy, softplus

from trimtab.optim.solvers import (
    fisher_hessian,
    fit_linear_head,
    fit_preference_head,
    gauss_newton_hessian,
    gradient_normalized_newton,
    logsumexp_hessian,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_sum_exp(m=100, n=10, mu=0.1):
    """f = mu log sum exp((<a_i, x> - b_i) / mu) with its minimum at 0: the gradient there is taken off the rows."""
    A = 2 * torch.rand(m, n, generator=generator(), dtype=torch.float64) - 1
    b = 2 * torch.rand(m, generator=generator(1), dtype=torch.float64) - 1
    A = A - torch.softmax(-b / mu, 0) @ A
    return A, b, mu, lambda x: mu * torch.logsumexp((A @ x - b) / mu, 0)


@pytest.mark.parametrize("kind", ["exact", "approximate", "zero", "diagonal"])
def test_every_step_keeps_the_papers_inequalities(kind):
    A, b, mu, f = log_sum_exp()
    hessian = logsumexp_hessian(A, b, mu) if kind == "approximate" else kind
    result = gradient_normalized_newton(f, torch.ones(10, dtype=torch.float64), hessian=hessian, max_iterations=30)
    assert len(result.history) == result.num_iterations > 5
    values = [step.fun for step in result.history] + [result.fun]
    norms = [step.grad_norm for step in result.history] + [result.grad_norm]
    for k, step in enumerate(result.history):
        assert step.step_norm <= step.gamma * (1 + 1e-9)
        needed = step.gamma * norms[k + 1] ** 2 / (8 * norms[k])
        assert values[k] - values[k + 1] >= needed - 1e-14


def test_the_approximation_sits_between_exact_and_none():
    A, b, mu, f = log_sum_exp()
    best = float(f(torch.zeros(10, dtype=torch.float64)))
    counts = {}
    for name, hessian in {"exact": "exact", "approximate": logsumexp_hessian(A, b, mu), "zero": "zero"}.items():
        reached = []
        gradient_normalized_newton(
            f,
            torch.ones(10, dtype=torch.float64),
            hessian=hessian,
            max_iterations=400,
            grad_tolerance=0,
            callback=lambda x, _step, reached=reached: reached.append(float(f(x)) - best) or reached[-1] < 1e-5,
        )
        assert reached[-1] < 1e-5 or name == "zero"
        counts[name] = len(reached)
    assert counts["exact"] < counts["approximate"] <= 0.4 * counts["zero"]


def test_the_theorys_radius_is_accepted_without_a_search():
    """f = L |x|^3 / 6 has gamma(x) >= sqrt(2 |g| / L)."""
    L = 3.0
    for x in torch.logspace(-3, 3, 13, dtype=torch.float64):
        radius = math.sqrt(2 * (L * x**2 / 2) / L)
        result = gradient_normalized_newton(
            lambda z: L * z.abs() ** 3 / 6, x.clone(), gamma0=radius, max_iterations=1, grad_tolerance=0
        )
        assert result.num_solves == 1 and result.history[0].gamma == radius


def test_without_a_hessian_it_is_normalized_gradient_descent():
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g = 2 * x * torch.tensor([1.0, 3.0, 0.1])
    result = gradient_normalized_newton(
        lambda z: (z.square() * torch.tensor([1.0, 3.0, 0.1])).sum(), x, hessian="zero", gamma0=0.01, max_iterations=1
    )
    assert torch.allclose(result.x - x, -0.01 * g / g.norm(), atol=1e-12)


def test_quadratic_is_superlinear():
    diagonal = torch.linspace(1, 100, 20, dtype=torch.float64)
    result = gradient_normalized_newton(
        lambda x: (diagonal * x.square()).sum() / 2 - x.sum(), torch.zeros(20).double(), grad_tolerance=1e-9
    )
    assert result.status == "converged" and result.num_iterations <= 8
    norms = [step.grad_norm for step in result.history]
    assert norms[-1] / norms[-2] < 0.1 * norms[2] / norms[1]
    assert torch.allclose(result.x, 1 / diagonal, atol=1e-9)


def bradley_terry(rows=800, d=24):
    truth = torch.randn(d, generator=generator(), dtype=torch.float64)
    x = torch.randn(rows, d, generator=generator(1), dtype=torch.float64)
    won = torch.rand(rows, generator=generator(2), dtype=torch.float64) < torch.sigmoid(x @ truth)
    x = torch.where(won[:, None], x, -x)
    return x, lambda w: softplus(-(x @ w)).mean()


def test_far_starts_converge_where_newtons_method_does_not():
    x, f = bradley_terry()
    start = 10 * torch.randn(24, generator=generator(3), dtype=torch.float64)
    known = minimize(lambda w: float(f(torch.from_numpy(w))), np.zeros(24), method="BFGS", options={"gtol": 1e-7}).fun
    result = gradient_normalized_newton(f, start, grad_tolerance=1e-9)
    assert result.status == "converged" and result.num_iterations <= 25
    assert result.fun == pytest.approx(known, abs=1e-8)
    w = start.clone()
    for _ in range(2):  # undamped
        g = torch.func.grad(f)(w)
        w = w - torch.linalg.solve(hessian_of(f, w) + 1e-14 * torch.eye(24).double(), g)
    assert float(f(w)) > 10 * float(f(start))


def test_gauss_newton_solves_rosenbrocks_chain():
    def residuals(x):
        return torch.cat([10 * (x[1:] - x[:-1].square()), 1 - x[:-1]])

    x0 = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64)
    options = {"max_iterations": 150, "grad_tolerance": 1e-12}
    f = lambda x: residuals(x).square().sum() / 2  # noqa: E731
    result = gradient_normalized_newton(f, x0, hessian=gauss_newton_hessian(residuals), **options)
    assert result.fun < 1e-20 and torch.allclose(result.x, torch.ones(10).double(), atol=1e-8)
    assert gradient_normalized_newton(f, x0, hessian="zero", **options).fun > 1e-4


def test_gauss_newton_of_other_powers_is_the_hessian_of_linear_residuals():
    A = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    x = torch.randn(3, generator=generator(1), dtype=torch.float64)
    for p in (2.0, 3.0, 4.0):
        exact = hessian_of(lambda z, p=p: (A @ z).norm() ** p / p, x)
        assert torch.allclose(gauss_newton_hessian(lambda z: A @ z, p)(x), exact)


def test_fisher_is_the_hessian_in_expectation():
    """Labels drawn from the model itself make the outer products' mean the Hessian's."""
    x = torch.randn(3000, 3, generator=generator(), dtype=torch.float64)
    w = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    y = (torch.rand(3000, generator=generator(1), dtype=torch.float64) < torch.sigmoid(x @ w)).double() * 2 - 1
    losses = lambda z: softplus(-y * (x @ z))  # noqa: E731
    fisher = fisher_hessian(losses)(w) / 3000
    exact = hessian_of(lambda z: losses(z).mean(), w)
    assert torch.allclose(fisher, exact, atol=0.03)


def test_conjugate_gradients_in_place_of_a_factor():
    x, f = bradley_terry(200, 10)
    start = torch.zeros(10, dtype=torch.float64)
    dense, free = (gradient_normalized_newton(f, start, solver=solver) for solver in ("cholesky", "cg"))
    assert dense.status == free.status == "converged"
    assert torch.allclose(dense.x, free.x, atol=1e-5)


def test_a_minimum_at_the_start_and_any_shape():
    result = gradient_normalized_newton(lambda x: x.square().sum(), torch.zeros(2, 3))
    assert result.num_iterations == 0 and result.status == "converged" and result.x.shape == (2, 3)
    saddle = gradient_normalized_newton(lambda x: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2, torch.tensor([0.1, 1.0]))
    assert torch.allclose(saddle.x, torch.tensor([1.0, 0.0]), atol=1e-4)  # the Hessian at the start is indefinite


def test_logistic_head_is_scipys():
    x = torch.randn(60, 5, generator=generator(), dtype=torch.float64)
    y = x[:, 0] - x[:, 1] + 0.5 * torch.randn(60, generator=generator(1), dtype=torch.float64) > 0
    head = fit_linear_head(x, y, l2=0.05)

    def objective(theta):
        z = x.numpy() @ theta[:-1] + theta[-1]
        return np.logaddexp(0, np.where(y.numpy(), -z, z)).mean() + 0.025 * np.square(theta[:-1]).sum()

    known = minimize(objective, np.zeros(6), method="BFGS", options={"gtol": 1e-9})
    assert np.allclose(head.weight.detach().numpy()[0], known.x[:-1], atol=1e-5)
    assert head.result.num_iterations < 15 and head.result.status == "converged"


def test_softmax_head_is_scipys():
    x = torch.randn(60, 3, generator=generator(), dtype=torch.float64)
    y = torch.stack([x[:, 0], x[:, 1], -x[:, 0] - x[:, 1]], 1).argmax(1)
    head = fit_linear_head(x, y, l2=0.1)
    p = torch.softmax(head(x), 1).detach()
    rest = (p - torch.nn.functional.one_hot(y, 3)).T @ x / 60 + 0.1 * head.weight.detach()
    assert rest.abs().max() < 1e-7  # stationary
    optimizer = torch.optim.LBFGS([weight := torch.zeros(3, 4).double().requires_grad_()], max_iter=300)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight[:, :3].T + weight[:, 3], y) + 0.05 * weight[:, :3].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(head.weight.detach(), weight.detach()[:, :3], atol=1e-4)


def test_preference_head_is_logistic_regression_of_differences():
    x = torch.randn(40, 4, generator=generator(), dtype=torch.float64)
    pairs = torch.randint(40, (50, 2), generator=generator(1))
    better = torch.where((x[pairs[:, 0], 0] > x[pairs[:, 1], 0])[:, None], pairs, pairs.flip(1))
    weights = torch.rand(50, generator=generator(2), dtype=torch.float64)
    head = fit_preference_head(x[better[:, 0]], x[better[:, 1]], l2=0.02, weights=weights)
    d = x[better[:, 0]] - x[better[:, 1]]
    w = head.weight[0].detach()
    rest = -(weights / weights.sum() * torch.sigmoid(-(d @ w))) @ d + 0.02 * w
    assert rest.abs().max() < 1e-8 and head.bias is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x0": torch.zeros(0)}, ValueError, "`x0` is empty"),
        ({"x0": torch.zeros(2, dtype=torch.long)}, TypeError, "`x0` is torch.int64"),
        ({"gamma0": 0.0}, ValueError, "`gamma0` is 0.0"),
        ({"hessian": "quasi"}, ValueError, "`hessian` is 'quasi'"),
        ({"hessian": lambda x: torch.ones(3, 3)}, ValueError, r"`hessian` gives shape \(3, 3\) for 2 variables"),
        ({"hessian": lambda x: torch.full((2, 2), math.nan)}, ValueError, "not finite"),
        ({"solver": "lu"}, ValueError, "`solver` is 'lu'"),
        ({"fun": lambda x: x.square()}, ValueError, r"`fun` gives shape \(2,\)"),
        ({"fun": lambda x: x.sum() * math.inf}, RuntimeError, "not finite at `x0`"),
        ({"fun": lambda x: x.square().sum() + torch.rand(())}, ValueError, "takes a deterministic function"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {"fun": lambda x: x.square().sum(), "x0": torch.ones(2), **changes}
    with pytest.raises(error, match=message):
        gradient_normalized_newton(arguments.pop("fun"), arguments.pop("x0"), **arguments)


def test_bad_heads_are_named():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"`labels` has the classes \[1\]"):
        fit_linear_head(x, torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match="`l2` is 0"):
        fit_linear_head(x, torch.tensor([0, 1, 0, 1]), l2=0)
    with pytest.raises(ValueError, match="`features` has entries that are not finite"):
        fit_linear_head(x * math.nan, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="`worse` has shape"):
        fit_preference_head(x, x[:2])
    with pytest.raises(ValueError, match="not all 0"):
        fit_preference_head(x, x, weights=torch.zeros(4))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_weight_counts_as_so_many_rows(classes):
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(30, 3, generator=g).double(), torch.arange(30) % classes
    weights = torch.randint(0, 3, (30,), generator=g)
    weighted = fit_linear_head(x, y, l2=0.05, weights=weights)
    repeated = fit_linear_head(x.repeat_interleave(weights, 0), y.repeat_interleave(weights), l2=0.05)
    assert torch.allclose(weighted.weight, repeated.weight, atol=1e-7)
    assert torch.allclose(weighted.bias, repeated.bias, atol=1e-7)
    with pytest.raises(ValueError, match="`weights`"):
        fit_linear_head(x, y, weights=-torch.ones(30))
