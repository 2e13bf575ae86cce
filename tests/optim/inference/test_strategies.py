"""Every strategy's gradient against exact values: by enumeration, in closed form, and by each other."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, Poisson

from trimtab.optim import check_reparam, estimate, sample

SAMPLES = 100_000


def rows(*values):
    """Parameters with one copy for each sample: their gradients are the samples' own."""
    return [torch.full((SAMPLES,), v, dtype=torch.float64, requires_grad=True) for v in values]


def gradients(program, params, seed=0, count=SAMPLES, **options):
    """(P, S): each sample's gradient; and the values."""
    generator = torch.Generator().manual_seed(seed)
    found = estimate(program, num_samples=count, vectorized=True, generator=generator, **options)
    found.surrogate.backward()
    return torch.stack([p.grad * count for p in params]), found.per_sample


def z_scores(samples, exact):
    mean, error = samples.mean(1), samples.std(1) / samples.shape[1] ** 0.5
    return ((mean - torch.tensor(exact, dtype=torch.float64)).abs() / error.clamp(min=1e-12)).tolist()


EXACT = (-0.2371, -1.1489, -1.1916)


@pytest.mark.parametrize(
    ("strategy", "baseline", "variance"),
    [("enum", None, 0.048), ("mvd", None, 0.048), ("reinforce", 0.0, 2.02), ("reinforce", "mean", 1.01)],
)
def test_strategies_agree_on_a_mixture(strategy, baseline, variance):
    """b ~ Bern(sigmoid(.3)), x ~ N(.5 or -.4, .49), (x - 1)^2 (1 + b): value, gradient and its variance.

    The flip's two runs share their noise, so that its measure-valued derivative is enumeration's; with noise of their
    own it would have 0.49.
    """
    params = rows(0.3, 0.5, -0.4)
    logit, right, left = params

    def program():
        b = sample(
            Bernoulli(probs=logit.sigmoid()), strategy=strategy, baseline=1.892791 if baseline == "mean" else baseline
        )
        x = sample(Normal(torch.where(b > 0, right, left), 0.7), strategy="reparam")
        return (x - 1).square() * (1 + b)

    found, values = gradients(program, params)
    exact = torch.tensor(EXACT, dtype=torch.float64)
    error = found.std(1) / SAMPLES**0.5
    assert bool(((found.mean(1) - exact).abs() < 4 * error + 6e-5).all())
    assert float(values.mean()) == pytest.approx(1.892791, abs=4 * float(values.std()) / SAMPLES**0.5)
    assert float(found[0].var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize(("strategy", "variance"), [("reparam", 1.96), ("reinforce", 10.9), ("mvd", 0.273)])
def test_normal_mean(strategy, variance):
    (mu,) = params = rows(0.5)
    found, _ = gradients(lambda: (sample(Normal(mu, 0.7), strategy=strategy, baseline=0.0) - 1).square(), params)
    assert z_scores(found, [-1.0])[0] < 4
    assert float(found.var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("strategy", ["reparam", "reinforce", "mvd"])
def test_normal_scale(strategy):
    (scale,) = params = rows(0.7)
    found, _ = gradients(lambda: sample(Normal(0.5, scale), strategy=strategy).pow(4), params)
    # E x^4 = m^4 + 6 m^2 s^2 + 3 s^4
    assert z_scores(found, [12 * 0.25 * 0.7 + 12 * 0.7**3])[0] < 4


@pytest.mark.parametrize("strategy", ["reinforce", "mvd"])
def test_poisson(strategy):
    (rate,) = params = rows(1.7)
    found, _ = gradients(lambda: sample(Poisson(rate), strategy=strategy).square(), params)
    assert z_scores(found, [2 * 1.7 + 1])[0] < 4


def test_discontinuity():
    """A comparison: its gradient is seen by score functions and measure-valued derivatives, and not by reparam."""
    exact = math.exp(-(0.5**2) / (2 * 0.49)) / (0.7 * math.sqrt(2 * math.pi))
    for strategy, variance in (("reinforce", 0.741), ("mvd", 0.0567)):
        (mu,) = params = rows(0.5)
        found, _ = gradients(
            lambda s=strategy, m=mu: (sample(Normal(m, 0.7), strategy=s, baseline=0.0) > 1).double(), params
        )
        assert z_scores(found, [exact])[0] < 4 and exact == pytest.approx(0.4416, abs=1e-4)
        assert float(found.var()) == pytest.approx(variance, rel=0.1)
    mu = torch.tensor(0.5, requires_grad=True)

    def program():
        x = sample(Normal(mu, 0.7), strategy="reparam")
        return (x > 1).float() + 0 * x

    with pytest.warns(UserWarning, match="not smooth"):
        check_reparam(program, params=[mu], num_samples=300)
    assert check_reparam(lambda: sample(Normal(mu, 0.7)).square(), params=[mu], num_samples=200) < 5


CHAIN = [0.3, -0.2, 0.8, 0.1]


def chain(a, b, c, strategies, rates):
    """Three dependent choices, the second of three values, and a cost that looks at all."""
    first = sample(Bernoulli(logits=a), strategy=strategies[0])
    logits = torch.stack([b * first, c, b - first], -1)
    second = sample(Categorical(logits=logits), strategy=strategies[1]).double()
    third = sample(Bernoulli(logits=c * second - b), strategy=strategies[2])
    return torch.cos(first + 2 * second) + third * (second - 0.5) + rates * first * third + rates.square()


@pytest.mark.parametrize(
    "strategies",
    [
        ("enum", "enum", "enum"), ("reinforce", "reinforce", "reinforce"), ("mvd", "enum", "mvd"),
        ("enum", "reinforce", "mvd"), ("reinforce", "enum", "reinforce"), ("mvd", "reinforce", "enum"),
        ("mvd", "reinforce", "mvd"),
    ],
)  # fmt: skip
def test_mixed_strategies_against_enumeration(strategies):
    exact = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in CHAIN]
    a, b, c, rate = exact
    total = 0.0
    for x in (0.0, 1.0):
        for y in range(3):
            for z in (0.0, 1.0):
                log_p = Bernoulli(logits=a).log_prob(torch.tensor(x, dtype=torch.float64)) + Bernoulli(
                    logits=c * y - b
                ).log_prob(torch.tensor(z, dtype=torch.float64))
                log_p = log_p + torch.stack([b * x, c, b - x]).log_softmax(0)[y]
                total = total + log_p.exp() * (math.cos(x + 2 * y) + z * (y - 0.5) + rate * x * z + rate**2)
    total.backward()
    params = rows(*CHAIN)
    found, values = gradients(lambda: chain(*params[:3], strategies, params[3]), params, seed=3)
    if strategies == ("enum",) * 3:
        torch.testing.assert_close(found[:, 0], torch.stack([p.grad for p in exact]), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(values[0], total.detach(), rtol=1e-12, atol=1e-12)
    else:
        assert max(z_scores(found, [float(p.grad) for p in exact])) < 4
        assert abs(float(values.mean() - total.detach())) < 4 * float(values.std()) / SAMPLES**0.5 + 1e-9


def test_joint_enumeration_of_several_elements():
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    found = estimate(lambda: sample(Independent(Bernoulli(logits=logits), 1), strategy="enum").sum().square())
    p = logits.sigmoid()
    exact = (p * (1 - p)).sum() + p.sum().square()
    torch.testing.assert_close(found.value, exact.detach())
    expected = torch.autograd.grad(exact, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(found.surrogate, logits)[0], expected)


def test_leave_one_out_leaves_no_bias_and_less_variance():
    """Few samples at a time, so that a baseline which saw its own sample would show."""
    exact = math.exp(0.3) / (1 + math.exp(0.3)) ** 2 * 10
    spread = {}
    for baseline in (0.0, None):
        logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(1500):
            result = estimate(
                lambda b=baseline, a=logit: 10 * sample(Bernoulli(logits=a), strategy="reinforce", baseline=b) + 5,
                num_samples=2, generator=generator,
            )  # fmt: skip
            found.append(torch.autograd.grad(result.surrogate, logit)[0])
        found = torch.stack(found)
        assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 1500**0.5
        spread[baseline] = float(found.var())
    assert spread[None] < 0.8 * spread[0.0]


def test_loop_and_vectorized_agree_and_seeds_hold():
    mu = torch.tensor(0.5, requires_grad=True)

    def program():
        return (sample(Normal(mu, 1.0)) + sample(Bernoulli(probs=mu), strategy="reinforce")).square()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = estimate(program, num_samples=5, generator=torch.Generator().manual_seed(1))
    again = estimate(program, num_samples=5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.per_sample, again.per_sample) and torch.equal(torch.get_rng_state(), before)
    wide = estimate(program, num_samples=20_000, vectorized=True)
    assert float(wide.value) == pytest.approx(0.25 + 1 + 0.5 + 0.5, abs=0.1)


def test_refuses():
    mu = torch.tensor([0.5, 0.1], requires_grad=True)
    with pytest.raises(RuntimeError, match="outside of a program"):
        sample(Normal(0.0, 1.0))
    for dist, strategy, message in (
        (Normal(0.0, 1.0), "enum", "'enum' at the site 'z'"),
        (Bernoulli(0.5), "reparam", "'reparam' at the site 'z', Bernoulli"),
        (Normal(mu, 1.0), "mvd", "'mvd' at the site 'z'"),
        (Independent(Bernoulli(0.5 * torch.ones(13)), 1), "enum", "more than 4096"),
        (Normal(0.0, 1.0), "pathwise", "`strategy` is 'pathwise'"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(lambda d=dist, s=strategy: sample(d, strategy=s, name="z").sum())
    with pytest.raises(ValueError, match="num_samples >= 2"):
        estimate(lambda: sample(Bernoulli(0.5), strategy="reinforce", baseline="leave_one_out"))
    with pytest.raises(ValueError, match="`program` gives"):
        estimate(lambda: mu * sample(Normal(0.0, 1.0)))
    with pytest.raises(RuntimeError, match="not finite"):
        estimate(lambda: sample(Normal(0.0, 1.0)) * math.inf)
