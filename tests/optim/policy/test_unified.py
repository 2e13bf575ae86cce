"""The unified loss against the textbook form of each method, and its estimator against exact gradients."""

import pytest
import torch

from trimtab.optim import group_advantages, stability_mask, unified_policy_loss

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
LENGTHS = torch.tensor([4, 2, 3, 4, 1, 3])
MASK = torch.arange(4)[None] < LENGTHS[:, None]


def problem(seed=0):
    """Six sequences of up to four tokens from a table of logits, and another policy's log-probabilities of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (6, 4), generator=generator)
    old = (logits.detach() + 0.4 * torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)

    def pick(table):
        return table.gather(-1, tokens[..., None])[..., 0]

    return logits, tokens, pick(logits.log_softmax(-1)), pick(old), rewards


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def per_sequence(terms):
    return (terms * MASK).sum(1) / LENGTHS


def sft(new, old, a):
    return -(new * MASK).sum() / MASK.sum()


def reinforce(new, old, a):
    return -(a * (new * MASK).sum(1)).sum()


def ppo(new, old, a):
    r = (new - old).exp()
    terms = torch.minimum(r * a[:, None], r.clamp(0.8, 1.2) * a[:, None])
    return -(terms * MASK).sum() / MASK.sum()


def grpo(new, old, a):
    r = (new - old).exp()
    return -per_sequence(torch.minimum(r * a[:, None], r.clamp(0.8, 1.2) * a[:, None])).mean()


def dr_grpo(new, old, a):
    r = (new - old).exp()
    return -((r * a[:, None] * MASK).sum(1) / 4).mean()


def gspo(new, old, a):
    s = per_sequence(new - old).exp()
    return -torch.minimum(s * a, s.clamp(0.8, 1.3) * a).mean()


def cispo(new, old, a):
    weight = (new - old).exp().clamp(0.8, 1.2).detach()
    return -(weight * a[:, None] * new * MASK).sum() / MASK.sum()


def luffy(new, old, a):
    p = new.exp()
    return -(p / (p + 0.1) * a[:, None] * MASK).sum() / MASK.sum()


TEXTBOOK = {
    "sft": (sft, {}),
    "reinforce": (reinforce, {"reduction": "sum"}),
    "ppo": (ppo, {"stability": "ppo", "old": True}),
    "grpo": (grpo, {"stability": "ppo", "old": True, "reduction": "sequence"}),
    "dr. grpo": (dr_grpo, {"old": True, "reduction": "constant", "constant": 4.0}),
    "gspo": (gspo, {"stability": "sequence", "old": True, "reduction": "sequence", "clip_high": 0.3}),
    "cispo": (cispo, {"stability": "detached", "old": True}),
    "luffy": (luffy, {"ref_log_probs": "one", "reshape": lambda p: p / (p + 0.1)}),
}


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("seed", range(3))
def test_textbook_forms(name, seed):
    logits, _, log_probs, old, rewards = problem(seed)
    advantages = torch.ones_like(rewards) if name == "sft" else rewards
    textbook, options = TEXTBOOK[name]
    options = dict(options)
    if options.pop("old", False):
        options["ref_log_probs"] = old
    found = unified_policy_loss(log_probs, advantages, mask=MASK, **options)
    torch.testing.assert_close(
        gradient(found.loss, logits), gradient(textbook(log_probs, old, advantages), logits), **TIGHT
    )
    whole = found.per_sample.sum() if options.get("reduction") == "sum" else found.per_sample.mean()
    torch.testing.assert_close(whole, found.loss, **TIGHT)
    assert bool((gradient(found.loss, logits)[~MASK] == 0).all())


def test_sft_is_cross_entropy():
    logits, tokens, log_probs, _, _ = problem()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    found = unified_policy_loss(log_probs, torch.ones(6))
    torch.testing.assert_close(gradient(found.loss, logits), gradient(expected, logits), **TIGHT)


def test_ppo_on_a_thousand_ratios():
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.zeros(1000, dtype=torch.float64, requires_grad=True)
    old = 0.4 * torch.randn(1000, generator=generator, dtype=torch.float64)
    advantages = torch.randn(1000, generator=generator, dtype=torch.float64)
    found = unified_policy_loss(log_probs, advantages, ref_log_probs=old, stability="ppo", reduction="sum")
    ratio = (log_probs - old).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    torch.testing.assert_close(gradient(found.loss, log_probs), gradient(expected, log_probs), **TIGHT)
    zero = gradient(found.loss, log_probs) == 0
    assert 100 < int(zero.sum()) < 900 and found.stable_fraction == pytest.approx(1 - float(zero.double().mean()))
    mask = stability_mask(-old, advantages, kind="ppo")
    assert torch.equal(mask, ~zero)


def test_group_advantages_are_grpo_s():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    grouped = rewards.view(2, 3)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
    found = group_advantages(rewards, torch.tensor([7, 7, 7, 2, 2, 2]), std=True)
    torch.testing.assert_close(found, expected.flatten(), **TIGHT)


def test_estimator_is_exact_in_expectation():
    """Both data distributions of the common objective, summed over all actions with their probabilities."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    beta = torch.randn(5, generator=generator, dtype=torch.float64).softmax(0)
    old = torch.randn(5, generator=generator, dtype=torch.float64).softmax(0)
    log_pi, mu = logits.log_softmax(0), 0.7
    reward_part = gradient((log_pi.exp() * rewards).sum(), logits)
    kl_part = gradient(-mu * (beta * (beta.log() - log_pi)).sum(), logits)

    def estimate(weights, advantages, reference):
        total = torch.zeros(5, dtype=torch.float64)
        for action in range(5):
            loss = unified_policy_loss(log_pi[[action]], advantages[[action]], ref_log_probs=reference[[action]]).loss
            total -= weights[action] * gradient(loss, logits)
        return total

    torch.testing.assert_close(estimate(old, rewards, old.log()), reward_part, **TIGHT)
    unified = rewards + mu * beta / log_pi.detach().exp()
    torch.testing.assert_close(estimate(beta, unified, beta.log()), reward_part + kl_part, **TIGHT)
    # A demonstration's term alone: mu pi_beta / pi_theta over pi_beta is SFT with its ratio of 1.
    sft_part = torch.zeros(5, dtype=torch.float64)
    for action in range(5):
        loss = unified_policy_loss(log_pi[[action]], torch.full((1,), mu, dtype=torch.float64)).loss
        sft_part -= beta[action] * gradient(loss, logits)
    torch.testing.assert_close(sft_part, kl_part, **TIGHT)


def test_kl_and_extreme_ratios():
    torch.manual_seed(0)
    old = torch.tensor([0.5, 0.3, 0.2]).log()
    new = torch.tensor([0.2, 0.3, 0.5]).log()
    draws = torch.multinomial(old.exp(), 200_000, replacement=True)
    found = unified_policy_loss(new[draws], torch.ones(200_000), ref_log_probs=old[draws])
    assert found.kl == pytest.approx(float((new.exp() * (new - old)).sum()), rel=0.02)
    far = unified_policy_loss(torch.zeros(1), torch.ones(1), ref_log_probs=torch.full((1,), -500.0))
    assert bool(torch.isfinite(far.loss))
    assert unified_policy_loss(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2)).loss.dtype == torch.float32


def test_refuses():
    log_probs = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="`advantages` has shape"):
        unified_policy_loss(log_probs, torch.zeros(2))
    with pytest.raises(ValueError, match="`ref_log_probs` requires a gradient"):
        unified_policy_loss(log_probs, torch.zeros(3), ref_log_probs=log_probs)
    with pytest.raises(ValueError, match="`log_probs` has values above 0"):
        unified_policy_loss(log_probs + 1, torch.zeros(3), ref_log_probs="one")
    with pytest.raises(ValueError, match="not empty"):
        unified_policy_loss(log_probs[:0], torch.zeros(0))
    with pytest.raises(ValueError, match="sample without tokens"):
        unified_policy_loss(log_probs, torch.zeros(3), mask=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="`constant` is None"):
        unified_policy_loss(log_probs, torch.zeros(3), reduction="constant")
    with pytest.raises(ValueError, match="`clip` is 1.0"):
        unified_policy_loss(log_probs, torch.zeros(3), clip=1.0)
