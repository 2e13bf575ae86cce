"""Score-function losses and Hessian products against closed forms and torch's own Hessians."""

import pytest
import torch
from torch.distributions import Normal

from trimtab.optim import gaussian_log_prob, policy_gradient_surrogate, policy_hvp

THETA, GOAL, DIRECTION = [0.5, -0.3, 0.2], [1.0, 1.0, -1.0], [0.3, -1.0, 0.5]


def gaussian_samples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions of N(THETA, 0.49) and their rewards exp(-||a - GOAL||^2 / 2)."""
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actions = torch.tensor(THETA, dtype=torch.float64) + 0.7 * noise
    return actions, torch.exp(-(actions - torch.tensor(GOAL)).square().sum(1) / 2)


def true_product() -> torch.Tensor:
    """The Hessian of J times the direction, J known in closed form."""

    def objective(theta):
        distance = (theta - torch.tensor(GOAL, dtype=torch.float64)).square().sum()
        return 1.49**-1.5 * torch.exp(-distance / (2 * 1.49))

    hessian = torch.autograd.functional.hessian(objective, torch.tensor(THETA, dtype=torch.float64))
    return hessian @ torch.tensor(DIRECTION, dtype=torch.float64)


def test_closed_form_of_the_product():
    assert true_product().tolist() == pytest.approx([-0.10530, -0.06250, 0.10790], abs=6e-5)


def estimate(actions, rewards, **options):
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    v = [torch.tensor(DIRECTION, dtype=torch.float64)]
    return policy_hvp(lambda: gaussian_log_prob(actions, theta, 0.7), [theta], v, rewards, **options)[0]


@pytest.mark.parametrize("baseline", [0.0, 0.3])
def test_product_is_unbiased(baseline):
    parts = []
    actions, rewards = gaussian_samples(200_000)
    for rows in torch.arange(200_000).chunk(50):
        parts.append(estimate(actions[rows], rewards[rows] - baseline))
    parts = torch.stack(parts)
    error = (parts.mean(0) - true_product()) / (parts.std(0) / len(parts) ** 0.5)
    assert float(error.abs().max()) < 4


def test_product_of_means_would_be_seen():
    """What the official code averages is off by more than the test above allows."""
    actions, rewards = gaussian_samples(200_000)
    theta = torch.tensor(THETA, dtype=torch.float64)
    score = (actions - theta) / 0.49
    v = torch.tensor(DIRECTION, dtype=torch.float64)
    wrong = (rewards[:, None] * score).mean(0) * (score @ v).mean() - rewards.mean() * v / 0.49
    assert float((wrong - true_product()).abs().max()) > 0.1


def test_product_equals_one_trajectory_at_a_time():
    actions, rewards = gaussian_samples(7)
    whole = estimate(actions, rewards)
    one_by_one = torch.stack([estimate(a[None], r[None]) for a, r in zip(actions, rewards, strict=True)]).mean(0)
    torch.testing.assert_close(whole, one_by_one, rtol=1e-10, atol=1e-12)


def network_problem():
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    states = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    actions = torch.randint(3, (5, 2, 1), generator=generator)
    weights = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]

    def log_probs():
        return model(states).log_softmax(-1).gather(-1, actions)[..., 0]

    return model, log_probs, v, weights


def test_product_of_steps_against_dense_hessians():
    model, log_probs, v, weights = network_problem()
    params = list(model.parameters())
    found = policy_hvp(log_probs, params, v, weights)
    flat_v = torch.cat([d.flatten() for d in v])
    total = torch.zeros_like(flat_v)
    for row in range(5):
        phi = torch.cat([g.flatten() for g in torch.autograd.grad((weights * log_probs())[row].sum(), params)])
        score = torch.cat([g.flatten() for g in torch.autograd.grad(log_probs()[row].sum(), params)])
        total += phi * (score @ flat_v) / 5
    gradient = torch.autograd.grad((weights * log_probs()).sum(1).mean(), params, create_graph=True)
    product = sum((g * d).sum() for g, d in zip(gradient, v, strict=True))
    total += torch.cat(
        [g.flatten() for g in torch.autograd.grad(product, params, allow_unused=True, materialize_grads=True)]
    )
    torch.testing.assert_close(torch.cat([b.flatten() for b in found]), total, rtol=1e-10, atol=1e-10)


def test_differences_agree_and_leave_the_parameters():
    model, log_probs, v, weights = network_problem()
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    exact = policy_hvp(log_probs, params, v, weights)
    close = policy_hvp(log_probs, params, v, weights, method="finite_difference")
    for a, b in zip(close, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))


def test_gaussian_log_prob_is_torch_s():
    x, mean, std = torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.rand(2, 1) + 0.1
    expected = Normal(mean, std.expand(3, 2, 5)).log_prob(x).sum((1, 2))
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, reduce="mean"), expected / 10)


def test_surrogate_is_the_score_function_estimate():
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.tensor([0, 3, 3]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    policy_gradient_surrogate(logits.log_softmax(0)[actions], advantages).backward()
    score = torch.eye(4, dtype=torch.float64)[actions] - logits.detach().softmax(0)
    torch.testing.assert_close(logits.grad, -(advantages[:, None] * score).mean(0), rtol=1e-10, atol=1e-12)


def test_refuses():
    theta = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="`std` has values"):
        gaussian_log_prob(theta[None], theta[None], 0.0)
    with pytest.raises(ValueError, match="`advantages` has shape"):
        policy_gradient_surrogate(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="`log_probs` has shape"):
        policy_gradient_surrogate(torch.zeros(()), torch.zeros(()))
    with pytest.raises(ValueError, match="`v` has other shapes"):
        policy_hvp(lambda: theta, [theta], [torch.zeros(2)], torch.zeros(3))
