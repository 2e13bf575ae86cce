"""The augmented Lagrangian solver against closed forms, scipy, and the problems of Hock and Schittkowski."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import minres as scipy_minres

from tests.optim.constrained.hock_schittkowski import PROBLEMS
from trimtab.optim.constrained import (
    AugmentedLagrangianSQP,
    exact_augmented_lagrangian,
    minimize_equality,
    minres,
    sketch_project,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed)).double()


def toy(n=20, seed=0):
    """A convex quartic on a sphere and a plane."""
    g = seeded(seed)
    A, a, b = (torch.randn(*shape, generator=g).double() for shape in ((n, n), (n,), (n,)))
    Q = A @ A.T / n + torch.eye(n).double()

    def f(x):
        return 0.5 * x @ Q @ x - b @ x + 0.05 * x.pow(4).sum()

    def c(x):
        return torch.stack([x.square().sum() - n, a @ x - 0.5])

    return f, c, torch.randn(n, generator=g).double()


def scipy_value(number, method):
    x0, f, c, _ = PROBLEMS[number]

    def as_numpy(function):
        return lambda x: function(torch.from_numpy(x)).numpy()

    gradient = torch.func.grad(f)
    jacobian = torch.func.jacrev(c)
    constraint = {"type": "eq", "fun": as_numpy(c), "jac": as_numpy(jacobian)}
    options = {"maxiter": 500} | ({"ftol": 1e-12} if method == "SLSQP" else {"gtol": 1e-9, "xtol": 1e-12})
    found = minimize(as_numpy(f), np.array(x0), jac=as_numpy(gradient), method=method, constraints=constraint,
                     options=options)  # fmt: skip
    assert np.abs(c(torch.from_numpy(found.x)).numpy()).max() < 1e-6
    return float(found.fun)


@pytest.mark.parametrize("number", sorted(PROBLEMS))
def test_hock_schittkowski(number):
    x0, f, c, best = PROBLEMS[number]
    found = minimize_equality(f, c, torch.tensor(x0).double(), tol=1e-7)
    assert found.status == "converged" and found.kkt <= 1e-7 and found.violation <= 1e-7
    assert found.value == pytest.approx(best, abs=1e-5)
    # The residual is what it says it is.
    slope = torch.func.grad(f)(found.x) + torch.func.jacrev(c)(found.x).T @ found.multipliers
    assert torch.cat([slope, c(found.x)]).norm().item() == pytest.approx(found.kkt, abs=1e-12)


SLSQP = (6, 7, 9, 27, 28, 39, 40, 42, 52, 77, 78, 79)


@pytest.mark.parametrize("number, method", [(n, "SLSQP") for n in SLSQP] + [(n, "trust-constr") for n in (7, 42)])
def test_scipy_finds_the_same_values(number, method):
    x0, f, c, _ = PROBLEMS[number]
    found = minimize_equality(f, c, torch.tensor(x0).double())
    assert found.value == pytest.approx(scipy_value(number, method), abs=1e-5)


@pytest.mark.parametrize("solver, numbers", [("sketch", (6, 26, 39, 46, 50, 77, 79)), ("minres", (7, 28, 40, 52, 78)),
                                             ("kaczmarz", (7,))])  # fmt: skip
def test_every_inner_solver_ends_at_the_same_points(solver, numbers):
    for number in numbers:
        x0, f, c, best = PROBLEMS[number]
        found = minimize_equality(f, c, torch.tensor(x0).double(), solver=solver)
        assert found.kkt <= 1e-6 and found.value == pytest.approx(best, abs=1e-4), number


def test_one_step_solves_a_quadratic_program():
    A, G, b, d = normal(10, 10), normal(3, 10, seed=1), normal(10, seed=2), normal(3, seed=3)
    Q = A @ A.T + torch.eye(10)
    found = minimize_equality(lambda x: 0.5 * x @ Q @ x + b @ x, lambda x: G @ x - d, torch.zeros(10), restore=False,
                              tol=1e-10)  # fmt: skip
    K = torch.cat([torch.cat([Q, G.T], 1), torch.cat([G, torch.zeros(3, 3)], 1)])
    exact = torch.linalg.solve(K, torch.cat([-b, d]))
    assert found.iterations == 1 and found.trace[0]["step_size"] == 1.0 and found.kkt <= 1e-10
    assert torch.allclose(torch.cat([found.x, found.multipliers]), exact, atol=1e-10)


def test_gradients_of_the_merit_are_those_of_differences():
    x, lam, h = normal(5), normal(2, seed=1), 1e-6

    def f(x):
        return (x[:3].prod() - x[3:].square().sum()).exp()

    def c(x):
        return torch.stack([x.square().sum() - 4, (x[0] * x[1]).sin() - x[4] ** 3])

    def at(x, lam):
        return exact_augmented_lagrangian(f, c, x, lam, 1.5, 0.3)[0]

    value, grad_x, grad_lam = exact_augmented_lagrangian(f, c, x, lam, 1.5, 0.3)
    slopes = [torch.stack([(at(*_plus(x, lam, which, i, h)) - at(*_plus(x, lam, which, i, -h))) / (2 * h)
                           for i in range(len((x, lam)[which]))]) for which in (0, 1)]  # fmt: skip
    assert torch.allclose(grad_x, slopes[0], rtol=1e-6, atol=1e-6)
    assert torch.allclose(grad_lam, slopes[1], rtol=1e-6, atol=1e-6)
    # The Hessian of f in place of the Lagrangian's, as in the authors' code, is off.
    slope = torch.func.grad(lambda p: f(p) + lam @ c(p))(x)
    bent = [torch.func.hessian(h)(x) @ slope for h in (f, lambda p: f(p) + lam @ c(p))]
    assert (grad_x + 0.3 * (bent[0] - bent[1]) - slopes[0]).abs().max() > 1e-3


def _plus(x, lam, which, i, h):
    point = [x.clone(), lam.clone()]
    point[which][i] += h
    return point


def test_a_linear_function_on_the_sphere():
    n = 20
    for seed in range(20):
        a, x0 = normal(n, seed=seed), normal(n, seed=100 + seed)
        x0 = -x0 if a @ x0 > 0 else x0
        found = minimize_equality(lambda x, a=a: a @ x, lambda x: (x.square().sum() - n).reshape(1), x0,
                                  lam0="least_squares", tol=1e-8)  # fmt: skip
        assert (found.x + math.sqrt(n) * a / a.norm()).abs().max() <= 1e-7
        assert found.multipliers.item() == pytest.approx(a.norm().item() / (2 * math.sqrt(n)), abs=1e-7)


def test_the_tail_is_linear_for_a_fixed_accuracy_and_superlinear_when_sharpened():
    f, c, x0 = toy()
    options = {"solver": "sketch", "block": 1, "tol": 1e-7, "generator": seeded(0)}
    fixed = minimize_equality(f, c, x0, inner_tol=0.1, **options)
    kkt = [entry["kkt"] for entry in fixed.trace][-6:]
    ratios = [after / before for before, after in zip(kkt, kkt[1:], strict=False)]
    assert all(0.05 <= ratio <= 0.15 for ratio in ratios), ratios
    assert all(entry["step_size"] == 1.0 for entry in fixed.trace[-5:])
    tight = minimize_equality(f, c, x0, inner_tol=1e-10, **{**options, "block": 8})
    assert tight.trace[-1]["kkt"] < 1e-3 * tight.trace[-2]["kkt"]
    sharp, plain = (
        minimize_equality(f, c, x0, sharpen=sharpen, **{**options, "tol": 1e-9, "block": 8})
        for sharpen in (True, False)
    )
    kkt = [entry["kkt"] for entry in sharp.trace]
    rates = [math.log(after) / math.log(before) for before, after in zip(kkt, kkt[1:], strict=False) if before < 0.1]
    assert sharp.status == "converged" and max(rates) > 1.5
    assert sharp.iterations <= plain.iterations - 2


def test_steps_are_shortened_where_newtons_method_diverges():
    """For sqrt(1 + x^2) a full Newton step goes from x to -x^3."""
    found = minimize_equality(
        lambda x: (1 + x.square()).sqrt().sum(), lambda x: (x[0] - x[1]).reshape(1), torch.tensor([2.0, 2.0, -3.0])
    )
    assert found.status == "converged" and found.x.abs().max() < 1e-6
    assert min(entry["step_size"] for entry in found.trace) < 1
    values = [entry["value"] for entry in found.trace]
    assert values == sorted(values, reverse=True)


def test_an_infeasible_start_is_first_made_nearly_feasible():
    f, c, x0 = toy()
    seen = []
    minimize_equality(f, c, 5 * x0, callback=lambda k, entry: seen.append(entry["violation"]) or k == 0)
    without = []
    options = {"restore": False, "callback": lambda k, entry: without.append(entry["violation"]) or k == 0}
    minimize_equality(f, c, 5 * x0, **options)
    assert seen[0] < 0.1 * without[0]
    far = minimize_equality(f, c, 50 * x0)
    assert far.status == "converged"


def test_whole_latents_without_any_matrix():
    """4096 unknowns: only products with Hessian and Jacobian; the norm on its shell and two means as given."""
    shape = (4, 32, 32)
    target, x0 = normal(*shape, seed=4), torch.randn(shape, generator=seeded(5))
    size = math.prod(shape)

    def f(x):
        away = x - target  # the sum of log cosh, up to a constant
        return (away + torch.nn.functional.softplus(-2 * away)).sum() + 0.1 * (x[:, 1:] - x[:, :-1]).square().sum()

    def c(x):
        return torch.cat([(x.square().sum() / size - 1).reshape(1), x[:2].mean((1, 2)) - 0.1])

    found = minimize_equality(f, c, x0, tol=1e-6)
    assert found.status == "converged" and found.x.shape == shape and found.x.dtype == torch.float64
    assert found.x.norm().item() == pytest.approx(math.sqrt(size), abs=1e-4)
    assert found.value < f(x0.double())
    tangent = torch.func.grad(f)(found.x).flatten() + torch.func.jacrev(c)(found.x).flatten(1).T @ found.multipliers
    assert tangent.norm() <= 1e-6


@pytest.mark.parametrize("kind", ["gaussian", "coordinate"])
@pytest.mark.parametrize("block", [1, 5])
def test_sketches_solve_systems_of_any_shape(kind, block):
    for shape in ((12, 12), (30, 8), (8, 30)):
        A = normal(*shape) + 2 * torch.eye(*shape)
        b = A @ normal(shape[1], seed=1)
        x, residual, steps = sketch_project(A, b, kind=kind, block=block, tol=1e-6, max_iter=100_000)
        assert residual <= 1e-6 * b.norm() and residual == pytest.approx((A @ x - b).norm().item())
        least = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
        assert torch.allclose(x, least, atol=1e-4)  # from 0 the limit has no part that A ignores


def test_products_alone_give_what_the_matrix_gives():
    A = normal(10, 10)
    A = A + A.T
    b = A @ normal(10, seed=1)
    by_matrix = sketch_project(A, b, block=6, tol=1e-7, generator=seeded(3))
    x, residual, _ = sketch_project(lambda v: A @ v, b, block=6, tol=1e-7, generator=seeded(3))
    assert residual <= 1e-7 * b.norm() and torch.allclose(x, by_matrix[0], atol=1e-4)


def test_kaczmarz_contracts_at_its_rate():
    U, V = (torch.linalg.qr(normal(50, 50, seed=seed)).Q for seed in (1, 2))
    A = U @ torch.diag(torch.linspace(1, 3, 50).double()) @ V.T
    exact = normal(50, seed=3)
    steps, ratios = 160, []
    for seed in range(50):
        options = {"kind": "coordinate", "block": 1, "tol": 1e-300, "max_iter": steps, "generator": seeded(seed)}
        x, _, made = sketch_project(A, A @ exact, **options)
        assert made == steps
        ratios.append(float((x - exact).square().sum() / exact.square().sum()))
    rate = 1 - 1 / float(A.square().sum())
    assert (sum(ratios) / 50) ** (1 / steps) <= 1 - 0.9 * (1 - rate)


def test_kaczmarz_draws_equations_by_their_squared_norms():
    """The mean of the squared error after one step is ||e||^2 - ||A e||^2 / ||A||_F^2, for these draws alone."""
    A = normal(6, 4) * torch.tensor([3.0, 1.0, 0.1, 1.0, 2.0, 0.2])[:, None]
    exact, generator = normal(4, seed=3), seeded(0)
    options = {"kind": "coordinate", "block": 1, "tol": 1e-300, "max_iter": 1, "generator": generator}
    left = [float((sketch_project(A, A @ exact, **options)[0] - exact).square().sum()) for _ in range(1500)]
    expected = float(exact @ exact - (A @ exact).square().sum() / A.square().sum())
    assert abs(np.mean(left) - expected) < 4 * np.std(left) / math.sqrt(1500)
    rows = (A @ exact).square() / A.square().sum(1)
    alike = float(exact @ exact - rows.mean())
    assert abs(np.mean(left) - alike) > 8 * np.std(left) / math.sqrt(1500)


def test_minres_is_scipys():
    for seed in range(5):
        A = normal(30, 30, seed=seed)
        A, b = A + A.T, normal(30, seed=50 + seed)
        operator = LinearOperator((30, 30), matvec=lambda v, A=A: A.numpy() @ v, dtype=float)
        for budget in (5, 12):
            x, residual, made = minres(lambda v, A=A: A @ v, b, tol=1e-12, max_iter=budget)
            other, _ = scipy_minres(operator, b.numpy(), rtol=1e-15, maxiter=budget)
            assert made == budget and np.allclose(x.numpy(), other, atol=1e-8)
            assert residual == pytest.approx((A @ x - b).norm().item(), rel=1e-6)
        x, _, _ = minres(lambda v, A=A: A @ v, b, tol=1e-10, x0=b, max_iter=400)
        assert torch.allclose(A @ x, b, atol=1e-7)
    singular = torch.diag(torch.tensor([1.0, -2.0, 0.0]).double())
    x, residual, _ = minres(lambda v: singular @ v, torch.tensor([1.0, 2.0, 0.0]).double())
    assert x.tolist() == pytest.approx([1.0, -1.0, 0.0])


def test_the_same_generator_gives_the_same_run_and_a_callback_ends_it():
    f, c, x0 = toy()
    first, again = (minimize_equality(f, c, x0, solver="sketch", generator=seeded(4)) for _ in range(2))
    assert torch.equal(first.x, again.x) and first.trace == again.trace
    ended = minimize_equality(f, c, x0, callback=lambda k, entry: k == 1)
    assert ended.status == "callback" and ended.iterations == 2


@pytest.mark.parametrize("solver", ["dense", "sketch", "minres"])
def test_a_run_goes_on_from_its_state(solver, tmp_path):
    f, c, x0 = toy()
    options = {"solver": solver, "tol": 1e-9}
    whole = minimize_equality(f, c, x0, generator=seeded(4), **options)
    loop = AugmentedLagrangianSQP(f, c, x0, generator=seeded(4), **options)
    for _ in range(4):
        loop.step()
    torch.save(loop.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    on = minimize_equality(f, c, x0, generator=seeded(9), state=state, **options)
    assert torch.equal(on.x, whole.x) and on.trace == whole.trace and on.status == whole.status == "converged"
    with pytest.raises(ValueError, match="`state`"):
        loop.load_state_dict({"x": x0})


def test_bad_input_is_named():
    f, c, x0 = toy()
    cases = [
        ({"tol": 0.0}, "`tol`"),
        ({"beta": 0.5}, "`beta`"),
        ({"nu": 1.0}, "`nu`"),
        ({"solver": "lu"}, "`solver`"),
        ({"lam0": torch.zeros(3)}, "`lam0`"),
        ({"lam0": "zeros"}, "`lam0`"),
        ({"eta2": -1.0}, "`eta2`"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            minimize_equality(f, c, x0, **options)
    with pytest.raises(ValueError, match="`c` gives 3 constraints of 2"):
        minimize_equality(lambda x: x.sum(), lambda x: x.sum() * torch.ones(3), torch.zeros(2))
    with pytest.raises(ValueError, match="`c` gives shape"):
        minimize_equality(lambda x: x.sum(), lambda x: x.sum(), torch.zeros(2))
    with pytest.raises(ValueError, match="`f` gives shape"):
        minimize_equality(lambda x: x, c, x0)
    with pytest.raises(ValueError, match="not finite at `x0`"):
        minimize_equality(lambda x: x.sum().log(), c, -x0.abs())
    with pytest.raises(ValueError, match="dependent constraints"):
        minimize_equality(lambda x: x.sum(), lambda x: x.square().sum().reshape(1) - 1, torch.zeros(3))
    with pytest.raises(ValueError, match="dependent constraints"):
        minimize_equality(lambda x: x @ x, lambda x: x.sum() * torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="at most 3000"):
        big = torch.ones(3001)
        minimize_equality(lambda x: x @ x, lambda x: x.sum().reshape(1) - 1, big, solver="dense")
    with pytest.raises(ValueError, match="'coordinate' takes a matrix"):
        sketch_project(lambda v: v, torch.ones(3), kind="coordinate")
    with pytest.raises(ValueError, match="`b`"):
        sketch_project(torch.eye(3), torch.ones(4))
