"""Trust in votes and the decay of a linear head, tuned by LV-HBA, where some votes are planted wrong ones."""

import pytest
import torch
from torch.nn.functional import normalize, softplus

from trimtab.rewards import PersonalReward, load_reward, tune_personal_reward
from trimtab.rewards.head_tuning import tune_head
from trimtab.rewards.personal import FeatureSpace
from trimtab.rewards.personal_votes import Votes

WRONG, RIGHT, TEST, WIDTH = 240, 120, 1000, 8


def planted(kind, seed=0, noise=0.3):
    """Inputs, votes of a linear taste with its own chance, and which of the first `WRONG` were turned round."""
    g = torch.Generator().manual_seed(seed)
    count = WRONG + RIGHT + TEST
    taste = 3 * normalize(torch.randn(WIDTH, generator=g).double(), dim=0)
    first, second = torch.randn(2, count, WIDTH, generator=g).double().mul(1.4)
    difference = first - second if kind == "pairs" else first
    said = torch.where(torch.rand(count, generator=g) < torch.sigmoid(difference @ taste), 1.0, -1.0).double()
    wrong = torch.rand(WRONG, generator=g) < noise
    said[:WRONG][wrong] *= -1
    if kind == "liked":
        return first, Votes(said, None), wrong
    rows = torch.stack([torch.arange(count), torch.arange(count) + count], 1)
    pairs = torch.where((said > 0)[:, None], rows, rows.flip(1))
    return torch.cat([first, second]), Votes(torch.ones(count).double(), pairs), wrong


def cut(x, votes, start, stop):
    if votes.pairs is None:
        return x[start:stop], Votes(votes.targets[start:stop], None)
    return x, Votes(votes.targets[start:stop], votes.pairs[start:stop])


def mean_loss(head, x, votes):
    with torch.no_grad():
        values = head(x.to(head.weight))[:, 0].double()
    margin = votes.targets * values if votes.pairs is None else values[votes.pairs[:, 0]] - values[votes.pairs[:, 1]]
    return float(softplus(-margin).mean())


@pytest.mark.parametrize("kind", ["pairs", "liked"])
def test_wrong_votes_lose_their_trust_and_unseen_votes_are_told_better(kind):
    x, votes, wrong = planted(kind)
    held_out = torch.arange(WRONG + RIGHT) >= WRONG
    inputs, seen = cut(x, votes, 0, WRONG + RIGHT)
    found = tune_head(inputs, seen, held_out, steps=500)
    trust = found.trust[:WRONG]
    higher = (trust[~wrong][:, None] > trust[wrong]).double() + 0.5 * (trust[~wrong][:, None] == trust[wrong])
    assert higher.mean() > 0.8  # of right over wrong votes; chance is 0.5
    assert trust[~wrong].mean() > 0.75 > 0.4 > trust[wrong].mean()
    assert (found.trust[WRONG:] == 1).all() and found.trust.min() >= 0
    assert found.held_out_loss < 0.8 * found.untuned_loss
    unseen = cut(x, votes, WRONG + RIGHT, None)
    plain = [
        mean_loss(tune_head(inputs, seen, held_out, decay=decay, steps=1, callback=lambda loop: True).head, *unseen)
        for decay in (1e-3, 1e-2, 1e-1)
    ]  # after one step trust is nearly full
    assert mean_loss(found.head, *unseen) < 0.9 * min(plain)


def test_of_right_votes_none_is_lost():
    x, votes, _ = planted("pairs", noise=0.0)
    inputs, seen = cut(x, votes, 0, WRONG + RIGHT)
    found = tune_head(inputs, seen, torch.arange(WRONG + RIGHT) >= WRONG, steps=300)
    assert found.trust.mean() > 0.75 and found.held_out_loss <= found.untuned_loss


def test_a_taste_is_refitted_in_its_own_feature_space_and_saved(tmp_path):
    clip = load_reward("bundled")
    width = clip_width(clip)
    x, votes, wrong = planted("pairs")
    basis = torch.linalg.qr(torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(1)))[0]
    features = normalize(x.float() @ basis.T, dim=1)
    space = FeatureSpace(torch.zeros(width), basis, torch.tensor(WIDTH**-0.5))
    taste = PersonalReward(clip, space, torch.nn.Linear(WIDTH, 1))
    pairs = votes.pairs[: WRONG + RIGHT]
    better, found = tune_personal_reward(taste, features, pairs=pairs, held_out=range(WRONG, WRONG + RIGHT), steps=300)
    assert found.trust[:WRONG][wrong].mean() < 0.5 < found.trust[:WRONG][~wrong].mean()
    values = better.score_features(features)
    agreed = values[votes.pairs[-TEST:, 0]] > values[votes.pairs[-TEST:, 1]]
    assert agreed.float().mean() > 0.75
    loaded = load_reward(better.save(tmp_path / "taste.safetensors"))
    assert torch.allclose(loaded.score_features(features), values, atol=1e-5)


def clip_width(clip):
    from trimtab.rewards.personal import picture_features

    return picture_features(clip, torch.rand(1, 3, 32, 32)).shape[1]


def test_a_callback_ends_the_loop_and_the_same_votes_give_the_same_head():
    x, votes, _ = planted("liked")
    inputs, seen = cut(x, votes, 0, WRONG + RIGHT)
    held_out = torch.arange(WRONG + RIGHT) >= WRONG
    steps = []
    one = tune_head(inputs, seen, held_out, callback=lambda loop: steps.append(loop.k) or loop.k == 5)
    two = tune_head(inputs, seen, held_out, steps=5)
    assert steps == [1, 2, 3, 4, 5] and torch.equal(one.trust, two.trust)
    assert torch.equal(one.head.weight, two.head.weight)


@pytest.mark.parametrize("change, words", [
    ({"held_out": [0, 1, 2]}, "`held_out` names 3 votes; takes 4 to 8"),
    ({"held_out": [0, 1, 2, 3, 12]}, "of 0 to 11"),
    ({"held_out": [0, 1, 2, 2]}, "each once"),
    ({"steps": 0}, "`steps`"),
    ({"decay": -1.0}, "`decay`"),
])  # fmt: skip
def test_bad_input_is_named(change, words):
    clip = load_reward("bundled")
    features = normalize(torch.randn(12, clip_width(clip), generator=torch.Generator().manual_seed(0)), dim=1)
    space = FeatureSpace.of(features, 3)
    taste = PersonalReward(clip, space, torch.nn.Linear(3, 1))
    options = {"held_out": [0, 1, 2, 3], "liked": [True, False] * 6, **change}
    with pytest.raises(ValueError, match=words):
        tune_personal_reward(taste, features, **options)
