"""Target surrogates against SGD, against ordinary least squares, and as an upper bound of the logistic loss."""

import copy
import math

import pytest
import torch
from torch import nn

from trimtab.optim import TargetSurrogate
from trimtab.optim.training.armijo import ArmijoStep


def logistic(seed=0, n=400, d=30, decay=-1.5):
    """Features of condition 10^-decay with noisy labels, and the mean logistic loss of outputs (n,)."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    features = u @ torch.diag(torch.logspace(0, decay, d, dtype=torch.float64)) @ v.T * math.sqrt(n)
    signal = features @ torch.randn(d, generator=generator, dtype=torch.float64)
    labels = torch.sign(signal + torch.randn(n, generator=generator, dtype=torch.float64))
    return features, lambda z: nn.functional.softplus(-labels * z).mean()


@pytest.mark.parametrize("eta", [0.01, 1.0, 100.0])
def test_one_inner_step_of_sgd_is_sgd(eta):
    features, loss = logistic()
    ours, plain = (nn.Parameter(torch.zeros(30, dtype=torch.float64)) for _ in range(2))
    surrogate = TargetSurrogate(torch.optim.SGD([ours], 0.7), eta=eta, inner_steps=1)
    sgd = torch.optim.SGD([plain], 0.7)
    for _ in range(5):
        step = surrogate.step(lambda: features @ ours, loss=loss)
        sgd.zero_grad()
        loss(features @ plain).backward()
        sgd.step()
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    assert step.loss_calls == 1 and step.model_passes == 1 and step.inner_steps == 1


def test_squared_loss_is_its_own_surrogate():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    inputs, targets = torch.randn(20, 3), torch.randn(20, 2)

    def loss(z):
        return 0.5 * (z - targets).square().sum()

    surrogate = TargetSurrogate(torch.optim.Adam(nets[0].parameters(), 1e-2), eta=1.0, inner_steps=7)
    step = surrogate.step(lambda: nets[0](inputs), loss=loss)
    adam = torch.optim.Adam(nets[1].parameters(), 1e-2)
    values = []
    for _ in range(7):
        adam.zero_grad()
        value = loss(nets[1](inputs))
        value.backward()
        values.append(float(value.detach()))
        adam.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [step.loss + value for value in step.surrogate] == pytest.approx(values, rel=1e-5)
    assert step.loss_calls == 1 and step.model_passes == 8  # one to see that the outputs are the same twice


def test_it_is_an_upper_bound_that_touches():
    features, loss = logistic()
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(30, generator=generator, dtype=torch.float64).requires_grad_()
    z = features @ theta
    (g,) = torch.autograd.grad(loss(z), z, retain_graph=True)
    eta = 4 * 400.0
    for scale in (1e-3, 1e-1, 1.0, 10.0):
        for _ in range(25):
            other = features @ (theta + scale * torch.randn(30, generator=generator, dtype=torch.float64))
            move = other - z
            top = loss(z) + (g * move).sum() + move.square().sum() / (2 * eta)
            assert float((top - loss(other)).detach()) >= -1e-10


@pytest.mark.parametrize("inner_steps", [1, 5, 20, 100])
def test_the_loss_never_rises(inner_steps):
    features, loss = logistic()
    eta = 4 * 400.0
    rate = eta / float(torch.linalg.matrix_norm(features, 2) ** 2)
    theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    surrogate = TargetSurrogate(
        torch.optim.SGD([theta], rate), eta=eta, inner_steps=inner_steps, check_upper_bound=True
    )
    steps = [surrogate.step(lambda: features @ theta, loss=loss) for _ in range(max(10, 400 // inner_steps))]
    losses = [step.loss for step in steps]
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:], strict=False))
    assert all(step.upper_bound_ok for step in steps) and steps[0].loss_calls == 2
    assert losses[-1] < 0.9 * losses[0]


def test_too_large_a_step_breaks_the_bound_and_the_search_mends_it():
    features, loss = logistic()
    for search in (False, True):
        theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        rate = 4 * 400.0 / float(torch.linalg.matrix_norm(features, 2) ** 2)
        surrogate = TargetSurrogate(
            torch.optim.SGD([theta], rate),
            eta=4e5,
            inner_steps=300,
            target_line_search=search,
            check_upper_bound=True,
        )
        step = surrogate.step(lambda theta=theta: features @ theta, loss=loss)
        assert step.upper_bound_ok == search
        assert (step.eta < 4e5) == search and (step.loss_calls > 2) == search


@pytest.mark.slow
def test_exact_inner_solution_of_a_linear_model():
    features, loss = logistic()
    eta = 4 * 400.0
    theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    g = torch.autograd.functional.jacobian(loss, features @ theta.detach())
    expected = -torch.linalg.lstsq(features, eta * g).solution
    rate = eta / float(torch.linalg.matrix_norm(features, 2) ** 2)
    step = TargetSurrogate(torch.optim.SGD([theta], rate), eta=eta, inner_steps=10_000).step(
        lambda: features @ theta, g
    )
    assert float((theta.detach() - expected).norm() / expected.norm()) < 1e-4
    assert step.loss is None and step.upper_bound_ok is None


def test_the_line_search_needs_no_rate():
    features, loss = logistic()
    for rate in (1e-4, 1e4):
        theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        surrogate = TargetSurrogate(torch.optim.SGD([theta], rate), eta=1600.0, inner_steps=10, line_search=True)
        steps = [surrogate.step(lambda theta=theta: features @ theta, loss=loss) for _ in range(30)]
        assert steps[-1].loss < 0.75 * steps[0].loss, rate
        assert all(b <= a for a, b in zip(steps[-1].surrogate, steps[-1].surrogate[1:], strict=False))


def test_armijo_is_the_textbook_condition():
    x = nn.Parameter(torch.tensor([1.0]))
    search = ArmijoStep(torch.optim.SGD([x], 1.0), growth=1.0)

    def value():
        return float(10 * x.detach().square().sum())

    for _ in range(3):
        old, x.grad = float(x.detach()), 20 * x.detach()
        start = value()
        search.step(start, value)
        length = search.scale
        assert value() <= start - 0.5 * length * (20 * old) ** 2
        assert 10 * (old - 2 * length * 20 * old) ** 2 > start - 0.5 * 2 * length * (20 * old) ** 2 or length == 1.0
    x.grad = -20 * x.detach()  # uphill: nothing to gain
    old = x.detach().clone()
    search.step(value(), value)
    assert float((x.detach() - old).abs()) < 1e-7


@pytest.mark.parametrize(("schedule", "etas"), [("sqrt", [2.0, 2 / 2**0.5]), ("exponential", [2 / 4**0.25, 1.0])])
def test_schedules(schedule, etas):
    x = nn.Parameter(torch.ones(2))
    surrogate = TargetSurrogate(torch.optim.SGD([x], 0.1), eta=2.0, schedule=schedule, total_steps=4, inner_steps=1)
    assert [surrogate.step(lambda: 1 * x, torch.ones(2)).eta for _ in range(2)] == pytest.approx(etas)


def test_a_tolerance_ends_inner_steps_and_moments_can_be_forgotten():
    x = nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([x], 0.1)
    surrogate = TargetSurrogate(adam, eta=1.0, inner_steps=500, inner_tol=1e-3, reset_inner_state=True)
    step = surrogate.step(lambda: 1 * x, torch.full((2,), 0.5))
    assert 1 < step.inner_steps < 500
    torch.testing.assert_close(x.detach(), torch.full((2,), 0.5), atol=1e-2, rtol=0)
    surrogate.inner_steps, surrogate.inner_tol = 3, 0.0
    surrogate.step(lambda: 1 * x, torch.ones(2))
    assert int(adam.state[x]["step"]) == 3


def test_state_round_trips_bit_for_bit():
    features, loss = logistic()

    def start():
        theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        adam = torch.optim.Adam([theta], 0.01)
        return theta, TargetSurrogate(adam, eta=1600.0, inner_steps=3, schedule="sqrt", line_search=True)

    theta, surrogate = start()
    for _ in range(3):
        surrogate.step(lambda: features @ theta, loss=loss)
    other, resumed = start()
    other.data.copy_(theta.data)
    resumed.load_state_dict(copy.deepcopy(surrogate.state_dict()))
    for _ in range(3):
        surrogate.step(lambda: features @ theta, loss=loss)
        resumed.step(lambda: features @ other, loss=loss)
    assert torch.equal(theta, other)


def test_half_precision_outputs_keep_their_small_moves():
    torch.manual_seed(0)
    net = nn.Linear(4, 4).bfloat16()
    inputs = torch.randn(8, 4).bfloat16()
    surrogate = TargetSurrogate(torch.optim.SGD(net.parameters(), 0.1), inner_steps=2)
    step = surrogate.step(lambda: net(inputs), lambda z: torch.ones_like(z))
    assert step.surrogate[0] == 0.0 and step.surrogate[1] < 0.0


def test_bad_input_is_named():
    x = nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([x], 0.1)
    for kwargs, message in (
        ({"eta": 0}, "`eta`"),
        ({"inner_steps": 0}, "`inner_steps`"),
        ({"schedule": "none"}, "`schedule`"),
        ({"schedule": "exponential"}, "`total_steps`"),
        ({"inner_tol": -1}, "`inner_tol`"),
    ):
        with pytest.raises(ValueError, match=message):
            TargetSurrogate(sgd, **kwargs)
    with pytest.raises(TypeError, match="`optimizer` is a Parameter"):
        TargetSurrogate(x)
    surrogate = TargetSurrogate(sgd)
    with pytest.raises(ValueError, match="neither"):
        surrogate.step(lambda: 1 * x)
    with pytest.raises(ValueError, match="both"):
        surrogate.step(lambda: 1 * x, torch.ones(2), loss=torch.sum)
    with pytest.raises(ValueError, match="shape \\(3,\\); takes \\(2,\\)"):
        surrogate.step(lambda: 1 * x, torch.ones(3))
    with pytest.raises(ValueError, match="not finite in outer step 1"):
        surrogate.step(lambda: 1 * x, torch.full((2,), math.nan))
    with pytest.raises(RuntimeError, match="without a graph"):
        surrogate.step(lambda: x.detach(), torch.ones(2))
    with pytest.raises(RuntimeError, match="differ"):
        surrogate.step(lambda: x * torch.rand(2), torch.ones(2))
    with pytest.raises(ValueError, match="take it"):
        TargetSurrogate(sgd, check_upper_bound=True).step(lambda: 1 * x, torch.ones(2))
    assert torch.equal(x.detach(), torch.ones(2))
