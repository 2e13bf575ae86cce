"""LV-HBA on problems with known solutions, one of them coupling both levels by its constraint."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from trimtab.optim.constrained import LVHBA, BilevelProblem, lv_hba, tune_reward_weights

N = 100


def coupled():
    """The paper's toy: x = -0.3, y1 = 0.7, y2 = -0.4, multiplier -1."""

    def project(x, y):
        excess = (x.sum() + y.sum()) / (3 * N)
        return x - excess, y - excess

    return BilevelProblem(
        upper=lambda x, y: 0.5 * (x - y[N:]).square().sum() + 0.5 * (y[:N] - 1).square().sum(),
        lower=lambda x, y: 0.5 * y[:N].square().sum() - (x * y[:N]).sum() + y[N:].sum(),
        constraint=lambda x, y: (x.sum() + y.sum()).reshape(1),
        project_xy=project,
        equality=True,
    )


START = (torch.full((N,), 3.0).double(), torch.full((2 * N,), 3.0).double())
DAMPED = {"eta": 0.02, "alpha": 0.02, "beta": 0.05, "gamma1": 2.0, "gamma2": 0.1, "p": 0.4}


def errors(found):
    parts = ((found.x, -0.3), (found.y[:N], 0.7), (found.y[N:], -0.4))
    return [float((value - target).norm() / (abs(target) * N**0.5)) for value, target in parts]


def clipped(p=0.3, **options):
    """Lower level min(x, 1); solution y = min(t / 1.1, 1)."""
    t = torch.tensor([2.0, -1.0, 0.5]).double()
    problem = BilevelProblem(
        upper=lambda x, y: 0.5 * (y - t).square().sum() + 0.05 * x.square().sum(),
        lower=lambda x, y: 0.5 * (y - x).square().sum(),
        constraint=lambda x, y: y - 1,
        project_xy=lambda x, y: (x, y.clamp(max=1.0)),
    )
    zero = torch.zeros(3).double()
    options = {"alpha": 0.02, "beta": 0.05, "eta": 0.05, "gamma1": 1.0, "gamma2": 1.0, "steps": 5000} | options
    return lv_hba(problem, zero, zero, p=p, **options)


def test_a_constraint_that_couples_both_levels_and_a_lower_level_of_many_solutions():
    found = lv_hba(coupled(), *START, steps=1500, **DAMPED)
    assert max(errors(found)) <= 0.05, errors(found)
    assert found.lam.item() == pytest.approx(-1.0, abs=0.01)
    assert found.violation < 1e-9 and found.steps == 1500


@pytest.mark.filterwarnings("ignore:theta lies")
def test_the_order_of_the_paper_diverges_there():
    try:
        found = lv_hba(coupled(), *START, steps=1500, gauss_seidel=False, **DAMPED)
    except RuntimeError as error:
        assert "diverged at step" in str(error)
    else:
        assert max(errors(found)) > 10


def test_an_inequality_with_a_closed_form_and_what_the_penalty_trades():
    found = clipped()
    assert found.y.tolist() == pytest.approx([1.0, -1 / 1.1, 0.5 / 1.1], abs=5e-3)
    assert 0 <= found.gap <= 1e-3
    strict = clipped(p=0.49)
    assert abs(strict.gap) <= 3e-5 and abs(strict.y[1] + 1 / 1.1) > 0.05


def test_the_running_saddle_gives_the_gradient_of_the_value_function():
    """v by scipy, its differences against what the steps of x, y and z take from the saddle."""
    A = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    B = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    x, y, z = (torch.tensor(v).double() for v in ([0.4, -0.2], [0.3, 0.1, -0.5], [0.6]))
    gamma1, gamma2 = 1.5, 0.7

    def f(x, y):
        return 0.5 * (B @ y - A @ x).square().sum() + y.sum() * x.sum()

    def g(x, y):
        return (y.sum() + x[0] - 0.2).reshape(1)

    def value(x, y, z):
        """For a given theta the best multiplier is the clipped z + gamma2 g."""

        def outer(t):
            t = torch.from_numpy(t).requires_grad_()
            lam = (z + gamma2 * g(x, t)).clamp_min(0)
            total = f(x, t) + lam @ g(x, t) + (t - y).square().sum() / (2 * gamma1)
            total = total - (lam - z).square().sum() / (2 * gamma2)
            (slope,) = torch.autograd.grad(total, t)
            return total.item(), slope.numpy()

        found = minimize(outer, y.numpy(), jac=True, method="BFGS", options={"gtol": 1e-11})
        return found.fun

    problem = BilevelProblem(lambda x, y: y.sum(), f, g, project_xy=lambda x, y: (x, y))
    loop = LVHBA(problem, x, y, eta=0.05, gamma1=gamma1, gamma2=gamma2, lam0=z, alpha=1e-30, beta=1e-30)
    for _ in range(1200):  # x, y and z stand still; theta and lam find the saddle
        loop.step()
    theta = loop.theta
    point = x.clone().requires_grad_()
    (in_x,) = torch.autograd.grad(f(point, theta) + loop.lam @ g(point, theta), point)
    claimed = torch.cat([in_x, (y - theta) / gamma1, (loop.lam - z) / gamma2])
    h, everything = 1e-4, torch.cat([x, y, z])
    for i in range(6):
        sides = []
        for sign in (1, -1):
            moved = everything.clone()
            moved[i] += sign * h
            sides.append(value(*moved.split([2, 3, 1])))
        assert claimed[i].item() == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-6)


def test_without_constraints_and_scaled_ones_end_at_the_same_points():
    t = torch.tensor([0.5, -1.0]).double()
    free = BilevelProblem(lambda x, y: 0.5 * (y - t).square().sum(), lambda x, y: 0.5 * (y - x).square().sum())
    zero = torch.zeros(2).double()
    found = lv_hba(free, zero, zero, steps=1500, alpha=0.1, eta=0.2, gamma1=1.0)
    assert torch.allclose(found.y, t, atol=0.03) and len(found.lam) == 0 and found.violation == 0.0

    def scaled(factor, **options):
        problem = BilevelProblem(
            upper=lambda x, y: 0.5 * (y - 2).square().sum() + 0.05 * x.square().sum(),
            lower=lambda x, y: 0.5 * (y - x).square().sum(),
            constraint=lambda x, y: factor * (y - 1),
            project_y=None,
            project_xy=lambda x, y: (x, y.clamp(max=1.0)),
        )
        return lv_hba(problem, zero, zero, steps=300, eta=0.05, beta=0.05, gamma1=1.0, gamma2=1.0, **options)

    one, many = scaled(1.0), scaled(1000.0, normalize_constraints=True)
    assert torch.allclose(one.y, many.y, atol=1e-9) and torch.allclose(one.lam, 1000 * many.lam, atol=1e-9)


def test_a_loop_goes_on_from_its_state_and_ends_when_told():
    whole, first, second = (LVHBA(coupled(), *START, **DAMPED) for _ in range(3))
    for _ in range(20):
        whole.step()
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(20):
        whole.step()
        second.step()
    assert torch.equal(whole.x, second.x) and torch.equal(whole.lam, second.lam) and second.k == 40
    with pytest.raises(ValueError, match="`state`"):
        second.load_state_dict({})
    with pytest.warns(UserWarning, match="theta lies"):
        on = lv_hba(coupled(), *START, steps=40, state=first.state_dict(), **DAMPED)
    assert torch.equal(on.x, whole.x) and on.steps == 40
    with pytest.warns(UserWarning, match="theta lies"):
        found = lv_hba(coupled(), *START, steps=50, callback=lambda loop: loop.k == 3, **DAMPED)
    assert found.steps == 3


def conflicting(seed):
    g = torch.Generator().manual_seed(seed)
    parts = [(torch.randn(6, 8, generator=g).double() / 2.5, torch.randn(6, generator=g).double()) for _ in range(3)]
    return [lambda y, A=A, b=b: -0.5 * (A @ y - b).square().sum() for A, b in parts]


def trained(rewards, weights):
    """What the lower level is at these weights, by scipy."""

    def loss(y):
        y = torch.from_numpy(y).requires_grad_()
        value = 0.005 * y.square().sum() - sum(w * r(y) for w, r in zip(weights, rewards, strict=True))
        (slope,) = torch.autograd.grad(value, y)
        return value.item(), slope.numpy()

    inside = {"type": "ineq", "fun": lambda y: 9 - y @ y, "jac": lambda y: -2 * y}
    return torch.from_numpy(minimize(loss, torch.zeros(8).double().numpy(), jac=True, constraints=inside).x)


@pytest.mark.parametrize("seed", range(2))
def test_weights_favour_what_the_judge_likes(seed):
    rewards = conflicting(seed)
    found = tune_reward_weights(rewards, rewards[0], torch.zeros(8).double(), radius=3.0)
    assert found.weights[0] > 0.9 and found.weights.sum().item() == pytest.approx(1.0)
    losses = [-rewards[0](trained(rewards, w)) for w in ([1.0, 0.0, 0.0], found.weights.tolist(), [1 / 3] * 3)]
    best, tuned, uniform = losses
    assert 20 * (tuned - best) < uniform - best
    assert found.y.norm() <= 3 + 1e-9


@pytest.mark.filterwarnings("ignore:theta lies")
def test_tuning_of_weights_goes_on_from_its_state():
    rewards, states = conflicting(0), []
    start = torch.zeros(8).double()
    whole = tune_reward_weights(rewards, rewards[0], start, steps=30)
    tune_reward_weights(rewards, rewards[0], start, steps=30, callback=lambda loop: states.append(loop.state_dict()))
    on = tune_reward_weights(rewards, rewards[0], start, steps=30, state=states[11])
    assert torch.equal(on.weights, whole.weights) and torch.equal(on.y, whole.y)


def test_weights_between_two_rewards_are_found():
    """A judge that likes two of three rewards: the best mix is inside of an edge, and scipy finds it too."""
    rewards = conflicting(0)

    def judge(y):
        return 0.7 * rewards[0](y) + 0.3 * rewards[1](y)

    found = tune_reward_weights(rewards, judge, torch.zeros(8).double(), radius=3.0)

    def loss(logits):
        weights = torch.softmax(torch.from_numpy(np.r_[logits, 0.0]), 0).tolist()
        return -judge(trained(rewards, weights)).item()

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6, "maxiter": 120})
    equal, tuned = loss([0.0, 0.0]), -judge(trained(rewards, found.weights.tolist())).item()
    assert tuned - best.fun < 0.02 * (equal - best.fun)
    assert found.weights[2] < 0.05 < found.weights[1] < found.weights[0]


def test_bad_input_is_named():
    problem, (x, y) = coupled(), START
    for options, message in (
        ({"p": 0.5}, "`p`"),
        ({"eta": 0.0}, "`eta`"),
        ({"r": -1.0}, "`r`"),
        ({"lam0": torch.zeros(2)}, "`lam0`"),
        ({"theta0": torch.zeros(2)}, "`theta0`"),
        ({"steps": 0}, "`steps`"),
    ):
        with pytest.raises(ValueError, match=message):
            lv_hba(problem, x, y, **options)
    alone = BilevelProblem(problem.upper, problem.lower, problem.constraint, equality=True)
    with pytest.raises(ValueError, match="`project_xy` is None"):
        lv_hba(alone, x, y)
    with pytest.raises(ValueError, match="takes a scalar"):
        lv_hba(BilevelProblem(lambda x, y: y, lambda x, y: y), x, y, steps=1)
    rewards = conflicting(0)
    for arguments, message in (((rewards[:1], rewards[0]), "`rewards`"), ((rewards, rewards[0]), "`weights0`")):
        with pytest.raises(ValueError, match=message):
            tune_reward_weights(*arguments, torch.zeros(8), weights0=torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="sum to 1"):
        tune_reward_weights(rewards, rewards[0], torch.zeros(8), weights0=torch.ones(3))


@pytest.mark.filterwarnings("ignore:theta lies")
def test_a_multiplier_at_its_bound_is_told():
    with pytest.warns(UserWarning, match="at its bound"):
        lv_hba(coupled(), *START, steps=300, r=0.1, **DAMPED)
