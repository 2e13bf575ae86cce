"""The personal reward: what it learns, what it refuses, and its file."""

import time

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import normalize

from trimtab.optim.solvers import relu_objective
from trimtab.rewards import CLIPReward, PersonalReward, fit_personal_reward, load_reward
from trimtab.rewards.personal import FeatureSpace, picture_features
from trimtab.rewards.personal_fit import train_network
from trimtab.rewards.personal_votes import Votes


@pytest.fixture(scope="module")
def clip() -> CLIPReward:
    return load_reward("bundled")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def people(rows: int = 400, seed: int = 0):
    """Features of length 1 and a taste that no linear function has: two of the directions must agree."""
    features = torch.randn(rows, 512, generator=generator(seed)) * torch.tensor([3.0] * 6 + [0.15] * 506)
    return normalize(features, dim=1), features[:, 0] * features[:, 1]


def agreement(reward: PersonalReward, features, taste) -> float:
    first, second = torch.randint(len(taste), (2, 4000), generator=generator(9))
    with torch.no_grad():
        f = reward.score_features(features)
    return float(((f[first] > f[second]) == (taste[first] > taste[second])).float().mean())


def preferences(taste, count: int, rows: int):
    pairs = torch.randint(rows, (count, 2), generator=generator(5))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return torch.where((taste[pairs[:, 0]] > taste[pairs[:, 1]])[:, None], pairs, pairs.flip(1))


@pytest.mark.parametrize("kind", ["pairs", "liked"])
def test_a_crooked_taste_takes_a_network(clip, kind):
    features, taste = people()
    votes = {"pairs": preferences(taste, 300, 200)} if kind == "pairs" else {"liked": taste[:200] > 0}
    fits = {
        head: fit_personal_reward(features[:200], head=head, features=clip, **votes) for head in ("polished", "linear")
    }
    scores = {head: agreement(reward, features[200:], taste[200:]) for head, reward in fits.items()}
    assert scores["polished"] > 0.75 > 0.6 > scores["linear"]


def test_two_hundred_examples_take_less_than_two_seconds(clip):
    features, taste = people(200)
    start = time.thread_time()
    fit_personal_reward(features, liked=taste > 0, features=clip)
    assert time.thread_time() - start < 2


def test_polished_is_never_above_the_network(clip):
    features, taste = people(120)
    pairs = preferences(taste, 100, 120)
    reward = fit_personal_reward(features, pairs=pairs, features=clip, decay=0.3)
    space = FeatureSpace(reward.mean, reward.basis, reward.scale)
    z = space(features).double()
    votes = Votes(torch.ones(len(pairs), dtype=torch.float64), pairs)
    trained = train_network(z, votes, 0.3, generator())
    objective = {"beta": 0.3, "loss": "logistic", "pairs": pairs}
    before, after = (relu_objective(head, z, None, **objective) for head in (trained, reward.head.double()))
    assert after < before - 1e-3 and before < 100 * 0.6931
    reward.head.float()


def test_features_are_the_models_own_layers(clip):
    """By hand, of the vision tower: the projection, and patch tokens' means after two and three of four layers."""
    pictures = torch.rand(3, 3, 128, 128, generator=generator())
    with torch.no_grad():
        out = clip.model.vision_model(pixel_values=clip.preprocessing(pictures), output_hidden_states=True)
        parts = [clip.model.visual_projection(out.pooler_output)]
        parts += [out.hidden_states[layer][:, 1:].mean(1) for layer in (2, 3)]
    features = picture_features(clip, pictures, batch_size=2)
    assert features.shape == (3, 512) and torch.allclose(features.norm(dim=1), torch.ones(3))
    known = torch.cat([normalize(part, dim=1) for part in parts], 1) / 3**0.5
    assert torch.allclose(features, known, atol=1e-6)
    with pytest.raises(ValueError, match="`depths` are"):
        clip.image_and_patch_features(pictures, (0.0,))


def test_space_keeps_distances_and_unit_scale():
    features, _ = people(50)
    space = FeatureSpace.of(features, 512)
    z = space(features)
    assert z.shape == (50, 49) and float(z.square().mean().detach()) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(torch.pdist(z) * space.scale, torch.pdist(features), atol=1e-4)
    assert FeatureSpace.of(features, 5)(features).shape == (50, 5)


def test_pictures_saved_and_loaded_score_alike(clip, tmp_path):
    pictures = torch.rand(12, 3, 64, 64, generator=generator()) * 0.5
    pictures[:6, 0] += 0.5
    liked = [True] * 6 + [False] * 6
    reward = fit_personal_reward(pictures, liked=liked, features=clip, name="reddish")
    reward.source = "bundled"
    path = reward.save(tmp_path / "taste.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taste.safetensors"] and path.stat().st_size < 30_000
    again = load_reward(path)
    values = reward(pictures, "")
    assert isinstance(again, PersonalReward) and again.name == "reddish"
    assert torch.equal(again(pictures, ""), values) and values[:6].min() > values[6:].max()
    picture = pictures[7:8].clone().requires_grad_()
    again(picture, "anything").sum().backward()
    better = (picture + 0.05 * picture.grad / picture.grad.norm()).detach()
    assert again(better, "") > values[7]  # its gradient leads to what is liked
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["features"] == "bundled"


def test_linear_head_is_saved_too(clip, tmp_path):
    features, taste = people(60)
    reward = fit_personal_reward(features, liked=taste > 0, head="linear", features=clip)
    reward.source = "bundled"
    again = load_reward(reward.save(tmp_path / "linear.safetensors"), features=clip)
    assert torch.equal(again.score_features(features), reward.score_features(features))


def test_robust_head_keeps_its_margin(clip):
    """Within the box no input lowers a liked picture's score by more than the spread that its margin counts."""
    features, taste = people(16)
    reward = fit_personal_reward(features, liked=taste > 0, head="robust", epsilon=1e-3, features=clip)
    z = FeatureSpace(reward.mean, reward.basis, reward.scale)(features)
    noise = 1e-3 * (2 * torch.rand(64, *z.shape, generator=generator()) - 1)
    with torch.no_grad():
        plain, moved = reward.head(z)[:, 0], reward.head(z + noise)[..., 0]
        slopes = torch.autograd.functional.jacobian(lambda x: reward.head(x).sum(), z)
    assert (moved - plain).abs().amax(0).le(1e-3 * slopes.abs().sum(1) + 1e-5).all() and plain.abs().max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"liked": [True] * 8}, "`liked` has 8 likes and no dislikes"),
        ({"liked": [False] * 8}, "`liked` has 8 dislikes and no likes"),
        ({"liked": [True, False]}, r"takes 8 booleans"),
        ({}, "takes `liked`, a boolean for each picture, or `pairs`"),
        ({"liked": [True] * 4 + [False] * 4, "pairs": [(0, 1)] * 4}, "and not both"),
        ({"pairs": [(0, 1), (1, 2), (2, 3)]}, "`pairs` has 3 votes; takes at least 4"),
        ({"pairs": [(0, 1), (1, 2), (2, 3), (3, 8)]}, "`pairs` names pictures 0 to 8"),
        ({"pairs": [(0, 1), (1, 2), (2, 3), (3, 3)]}, "a picture preferred to itself"),
        ({"pairs": [(0, 1), (1, 0), (2, 3), (3, 2)]}, "every pair both ways round"),
        ({"liked": [True] * 4 + [False] * 4, "decay": 0.0}, "`decay` is 0.0"),
        ({"liked": [True] * 4 + [False] * 4, "head": "deep"}, "`head` is 'deep'"),
        ({"liked": [True, False] * 4, "head": "robust", "epsilon": 50.0}, "`epsilon` is 50; no pattern"),
    ],
)
def test_degenerate_votes_are_named(clip, arguments, message):
    features, _ = people(8)
    with pytest.raises(ValueError, match=message):
        fit_personal_reward(features, features=clip, **arguments)


def test_degenerate_pictures_are_named(clip):
    with pytest.raises(ValueError, match="`pictures` are all the same"):
        fit_personal_reward(torch.ones(6, 512), liked=[True, False] * 3, features=clip)
    features, _ = people(8)
    features[1::2] = features[::2]
    with pytest.raises(ValueError, match="compares duplicates only"):
        fit_personal_reward(features, pairs=[(0, 1), (2, 3), (4, 5), (6, 7)], features=clip)
    twice = features[[0, 0, 2, 2]]
    with pytest.raises(ValueError, match="contradicts itself"):
        fit_personal_reward(twice, liked=[True, False, True, False], features=clip)
    with pytest.raises(ValueError, match="not finite"):
        fit_personal_reward(torch.full((6, 512), torch.nan), liked=[True, False] * 3, features=clip)
    with pytest.raises(ValueError, match=r"`pictures` is features \(6, 128\); 'bundled' gives 512"):
        fit_personal_reward(torch.ones(6, 128), liked=[True, False] * 3, features=clip)
    with pytest.raises(ValueError, match="takes floating"):
        fit_personal_reward(torch.ones(6, 3, 8, 8, dtype=torch.uint8), liked=[True, False] * 3, features=clip)


def test_another_file_is_named(clip, tmp_path):
    from safetensors.torch import save_file

    save_file({"personal.mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has the format None"):
        load_reward(tmp_path / "other.safetensors")
    features, taste = people(20)
    reward = fit_personal_reward(features, liked=taste > 0, features=clip)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        reward.save(tmp_path / "taste.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"personal.basis": None}, "lack personal.basis"),
        ({"personal.mean": torch.full((128,), torch.nan)}, "not finite numbers in personal.mean"),
        ({"personal.scale": torch.zeros(())}, "one number > 0"),
        ({"personal.basis": torch.zeros(127, 5)}, r"\(127, 5\)"),
        ({"personal.head.0.weight": torch.zeros(32, 3)}, "head does not fit 5 numbers"),
        ({"personal.head.2.weight": None}, "head does not fit"),
        ({"personal.head.0.weight": torch.zeros(32)}, "head does not fit"),
    ],
)
def test_a_damaged_file_is_named(clip, tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    features, taste = people(20)
    path = fit_personal_reward(features, liked=taste > 0, features=clip).save(tmp_path / "taste.safetensors")
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    weights = {name: value for name, value in (load_file(path) | change).items() if value is not None}
    save_file(weights, path, about)
    with pytest.raises(ValueError, match=message):
        load_reward(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        PersonalReward.from_weights(path)
