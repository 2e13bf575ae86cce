"""The solver by first derivatives against the one by second derivatives, and closed forms."""

import math

import pytest
import torch

from tests.optim.constrained.hock_schittkowski import PROBLEMS
from tests.optim.constrained.test_augmented_lagrangian import normal, toy
from trimtab.optim.constrained import FirstOrderSQP, minimize_equality


def solve(f, c, x0, evaluations, **options):
    solver = FirstOrderSQP(x0, **options)
    for _ in range(evaluations):
        x = solver.ask()
        solver.tell(float(f(x)), torch.func.grad(f)(x), c(x), torch.func.jacrev(c)(x))
    return solver


@pytest.mark.parametrize("seed", range(3))
def test_it_ends_where_newtons_method_ends(seed):
    f, c, x0 = toy(seed=seed)
    best = minimize_equality(f, c, x0)
    found = solve(f, c, x0, 150)
    assert found.point.residual(found.lam) < 1e-3 and found.point.violation < 1e-6
    assert found.point.value <= best.value + 1e-4


@pytest.mark.parametrize("number, evaluations", [(28, 60), (42, 60), (48, 60), (51, 60), (52, 200), (79, 200)])
def test_hock_schittkowski(number, evaluations):
    x0, f, c, best = PROBLEMS[number]
    found = solve(f, c, torch.tensor(x0).double(), evaluations)
    assert found.point.value == pytest.approx(best, abs=1e-3) and found.point.violation < 1e-4


@pytest.mark.parametrize("units", [1e-3, 1.0, 1e3])
def test_units_of_neither_function_matter(units):
    a, x0 = normal(20), normal(20, seed=1)

    def c(x):
        return (x.square().sum() - 20).reshape(1) / units

    found = solve(lambda x: units * (a @ x), c, x0, 80)
    assert (found.point.x + math.sqrt(20) * a / a.norm()).abs().max() < 1e-3


def test_restoration_is_newtons_method_on_the_constraints():
    f, c, x0 = toy()
    solver = FirstOrderSQP(x0)
    violations = []
    for _ in range(6):
        x = solver.restoration()
        solver.tell(float(f(x)), torch.func.grad(f)(x), c(x), torch.func.jacrev(c)(x), x)
        violations.append(solver.point.violation)
    assert violations[-1] < 1e-12 and violations[3] < violations[2] ** 1.5
    exact = x0 - torch.linalg.pinv(torch.func.jacrev(c)(x0)) @ c(x0)
    again = FirstOrderSQP(x0)
    again.tell(float(f(x0)), torch.func.grad(f)(x0), c(x0), torch.func.jacrev(c)(x0))
    assert torch.allclose(again.restoration(), exact, atol=1e-10)


@pytest.mark.parametrize("restoring, reach", [(True, math.inf), (True, 0.2), (False, 0.2)])
def test_a_bent_constraint_is_reached_where_newtons_method_on_it_diverges(restoring, reach):
    """atan(x) = 0 from 3, where |x| > 1.39 is beyond Newton's method."""

    def f(x):
        return x[1].square()

    def c(x):
        return torch.atan(x[:1])

    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert abs(3 - (1 + 9) * math.atan(3)) > 9  # Newton's first step
    solver = FirstOrderSQP(x, reach=reach)
    for _ in range(40):
        x = solver.restoration() if restoring else solver.ask()
        solver.tell(float(f(x)), torch.func.grad(f)(x), c(x), torch.func.jacrev(c)(x), x if restoring else None)
    assert abs(float(solver.point.x[0])) < 1e-6
    assert abs(float(solver.point.x[1]) - restoring) < 1e-3  # the other coordinate is f's


def test_a_trial_that_is_worse_or_not_finite_is_refused_and_asked_for_at_half_the_length():
    f, c, x0 = toy()
    solver = FirstOrderSQP(x0)
    assert torch.equal(solver.ask(), x0)
    solver.tell(float(f(x0)), torch.func.grad(f)(x0), c(x0), torch.func.jacrev(c)(x0))
    first = solver.ask()
    for halvings, value in ((1, math.inf), (2, float(f(x0)) + 1e6)):
        assert not solver.tell(value, torch.func.grad(f)(first), c(first), torch.func.jacrev(c)(first))
        assert torch.equal(solver.point.x, x0)
        assert torch.allclose(solver.ask() - x0, (first - x0) / 2**halvings)


def test_a_run_goes_on_from_its_state():
    f, c, x0 = toy()
    whole = solve(f, c, x0, 30)
    half, other = solve(f, c, x0, 15), FirstOrderSQP(x0)
    other.load_state_dict(half.state_dict())
    for _ in range(15):
        x = other.ask()
        other.tell(float(f(x)), torch.func.grad(f)(x), c(x), torch.func.jacrev(c)(x))
    assert torch.equal(other.ask(), whole.ask())
    with pytest.raises(ValueError, match="`state`"):
        other.load_state_dict({})


def test_bad_input_is_named():
    for options in ({"step": 0.0}, {"beta": 0.5}, {"nu": 1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            FirstOrderSQP(torch.ones(3), **options)
