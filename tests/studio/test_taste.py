"""The Taste tab: which pairs are asked, what is told, files from strangers, and the endpoints through gradio_client."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import load_file, save_file

from trimtab.rewards import fit_personal_reward, load_reward, personal_votes
from trimtab.rewards.personal import picture_features
from trimtab.studio import taste_choice
from trimtab.studio.improve_job import ImproveJob
from trimtab.studio.rewards import loaded_reward
from trimtab.studio.runs import Stop, stream
from trimtab.studio.taste_choice import Ballot, told, undone, voted
from trimtab.studio.taste_file import TasteFile
from trimtab.studio.taste_job import Stock, TasteJob, fit_taste, python_code, scores_of, told_apart

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*kept in float32:UserWarning"),
]
PROMPTS = "a panda on a lavender background\ntwo red hearts on a pink background"
HERE = ("bundled",)


def features(count, seed=0):
    clip = loaded_reward("bundled", "cpu")
    width = picture_features(clip, torch.zeros(1, 3, 64, 64)).shape[1]
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] *= 20  # what the choices are by is what differs most, so that a few of them tell
    return torch.nn.functional.normalize(rows, dim=1)


def stock_of(rows):
    pictures = tuple(Image.new("RGB", (4, 4)) for _ in rows)
    return Stock(TasteJob(PROMPTS), pictures, tuple(tuple(row.tolist()) for row in rows))


@pytest.fixture(scope="module")
def taste(tmp_path_factory):
    """A taste's file, and the features and choices that it was fitted to."""
    rows = features(10)
    likes = rows[:, 0].argsort(descending=True).tolist()
    votes = list(zip(likes[:5], likes[5:], strict=True)) + list(zip(likes[::2], likes[1::2], strict=True))
    path = tmp_path_factory.mktemp("taste") / "taste.safetensors"
    fit_taste(stock_of(rows), votes, "polished").save(path)
    return path, rows, votes


def test_every_pair_is_asked_once_and_all_pictures_as_often():
    ballot, shown, pairs = voted(Ballot(), "neither", 7, 3), [0] * 7, []
    while ballot.pair is not None:
        pairs.append(tuple(sorted(ballot.pair)))
        for number in ballot.pair:
            shown[number] += 1
        assert max(shown) - min(shown) <= 2
        ballot = voted(ballot, ("left", "right", "neither")[len(pairs) % 3], 7, 3)
    assert sorted(pairs) == [(i, j) for i in range(7) for j in range(i + 1, 7)]
    assert len(ballot.votes) == 14 and voted(ballot, "neither", 8, 3).pair is not None  # one more picture came
    with pytest.raises(ValueError, match="no two pictures to choose"):
        voted(ballot, "left", 7, 3)


def test_the_preferred_picture_stands_first_and_a_choice_can_be_taken_back():
    first = voted(Ballot(), "neither", 6, 0)
    for side in ("left", "right"):
        after = voted(first, side, 6, 0)
        assert after.votes == ((first.pair if side == "left" else first.pair[::-1]),)
        assert undone(after) == first
    with pytest.raises(ValueError, match="no choice to take back"):
        undone(first)


def test_what_was_foreseen_is_judged_by_scores_from_before():
    ballot, scores = voted(Ballot(), "neither", 6, 0), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert voted(ballot, "left", 6, 0).foreseen == (None,)
    for _ in range(8):  # the larger number is liked, but for the last two
        better = "left" if ballot.pair[0] > ballot.pair[1] else "right"
        worse = "right" if better == "left" else "left"
        ballot = voted(ballot, better if len(ballot.votes) < 6 else worse, 6, 0, scores)
    assert ballot.foreseen == (True,) * 6 + (False,) * 2
    assert "Of the last 8 it foresaw 6 before it was told" in told(ballot)


def test_what_makes_choices_doubtful_is_told():
    ballot = voted(Ballot(), "neither", 9, 0)
    assert told(ballot) == "0 choices. From 4 on your taste is fitted."
    for _ in range(8):
        ballot = voted(ballot, "left", 9, 0)
    assert "All were of the left picture" in told(ballot)
    assert "All were" not in told(voted(ballot, "right", 9, 0))
    assert taste_choice.LEAST_VOTES == personal_votes.LEAST_VOTES


def test_a_taste_is_the_personal_reward_of_the_choices(taste):
    path, rows, votes = taste
    scores = scores_of(TasteFile(str(path), HERE), stock_of(rows))
    expected = fit_personal_reward(rows, pairs=votes, features=load_reward("bundled"))
    assert torch.allclose(torch.tensor(scores), expected.score_features(rows), atol=1e-5)
    assert sum(scores[first] > scores[last] for first, last in votes) >= 0.9 * len(votes)
    with pytest.raises(ValueError, match="3 choices; a taste takes at least 4"):
        fit_taste(stock_of(rows), votes[:3], "polished")
    with pytest.raises(ValueError, match="all the same"):
        fit_taste(stock_of(rows[:1].repeat(8, 1)), [(0, 1), (2, 3), (4, 5), (6, 7)], "polished")


def test_it_is_told_how_well_the_liked_can_be_told_apart():
    rows = features(16)
    rows[:, 0] = rows[:, 0].sign()  # the liked have 1 there, the others -1
    rows[:, 1:] *= 0.05
    likes, others = (torch.where(side)[0].tolist() for side in (rows[:, 0] > 0, rows[:, 0] < 0))
    pairs = list(zip(likes, others, strict=False))
    assert len(pairs) >= 4 and told_apart(stock_of(rows), pairs[:3]) == ""
    text = told_apart(stock_of(rows), pairs)
    assert f"You mostly chose {len(pairs)} of {2 * len(pairs)} pictures" in text
    assert "take 0 to 0 % for the wrong kind (guessing: 50 %" in text and "hardly better" not in text
    # Each picture beside one that is all but the same and has the other label: neighbours always err.
    twins = torch.cat([rows[likes[:4]], rows[likes[:4]] + 1e-3])
    text = told_apart(stock_of(twins), [(i, i + 4) for i in range(4)])
    assert "to 100 % for the wrong kind" in text and "hardly better than guessing" in text


def changed(path, folder, about=None, **weights):
    """The file with another metadata or other weights."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | (about or {})
    save_file(load_file(path) | {f"personal.{name}": value for name, value in weights.items()}, folder / "t", metadata)
    return folder / "t"


def test_strangers_files_are_refused_in_words_and_load_no_other_model(taste, tmp_path, monkeypatch):
    path, *_ = taste
    loaded_reward("bundled", "cpu")
    monkeypatch.setattr("trimtab.rewards.CLIPReward.from_pretrained", None)  # calling it is an error of another type
    bad = {
        "not allowed here": changed(path, tmp_path, {"features": "somebody/else"}).read_bytes(),
        "is not allowed": changed(path, tmp_path, {"features": "/etc/passwd"}).read_bytes(),
        "no taste made here": changed(path, tmp_path, {"format": "other"}).read_bytes(),
        "larger than 2 MB": path.read_bytes() + bytes(2_000_000),
        "cannot be used: .*not finite": changed(path, tmp_path, scale=torch.tensor(torch.inf)).read_bytes(),
        "cannot be used: .*shapes": changed(path, tmp_path, basis=torch.zeros(3, 2)).read_bytes(),
        "cannot be used: .*whole": path.read_bytes()[:-4],
    }
    bad |= {f"no taste(?#{n})": content for n, content in enumerate([b"", b"words", b"\xff" * 9, bytes(8) + b"[1]"])}
    assert TasteFile(str(path), HERE).load("cpu").name == "my taste"
    for words, content in bad.items():
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            TasteFile(str(tmp_path / "bad.safetensors"), HERE).load("cpu")
        assert str(tmp_path) not in str(error.value)


def test_the_taste_of_a_stock_is_that_of_its_code(tmp_path, monkeypatch):
    job = TasteJob(PROMPTS, count=6, seed=3)
    *_, last = stream(job, Stop(tmp_path), 600, 1024)
    made = last.result
    assert last.finished and not last.error and len(made.pictures) == 6
    votes = [(0, 1), (2, 3), (4, 5), (0, 3)]
    fit_taste(made, votes, "linear").save(tmp_path / "ours.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(python_code(job, votes, "linear"), {})
    ours, theirs = (scores_of(TasteFile(str(tmp_path / name), HERE), made) for name in
                    ("ours.safetensors", "taste.safetensors"))  # fmt: skip
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": " \n "}, "a line for each"),
        ({"prompts": "a\n" * 21}, "up to 20 lines"),
        ({"count": 3}, "number of pictures"),
        ({"seed": -1}, "seed"),
        ({"features": "aesthetic"}, "features take one of"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"steps": 2.5}, "steps"),
    ],
)
def test_bad_settings_are_refused_in_words(changes, words):
    with pytest.raises(ValueError, match=words):
        TasteJob(**({"prompts": PROMPTS} | changes))


def test_improve_needs_the_file_of_a_taste(taste):
    with pytest.raises(ValueError, match="no taste yet"):
        ImproveJob("a cat", reward="taste")
    with pytest.raises(ValueError, match="not allowed here"):
        ImproveJob("a cat", reward="taste", taste=TasteFile(str(taste[0]), ("clip",)))


def file_of(download) -> str:
    return download["value"] if isinstance(download, dict) else download


@pytest.fixture(scope="module")
def chosen(app_url):
    """A visitor who made four pictures and chose four times, and what was given."""
    client = Client(app_url, verbose=False)
    with pytest.raises(AppError, match="no pictures yet"):
        client.predict("left", api_name="/choose_picture")
    client.predict(prompts=PROMPTS, count=4, model="bundled", api_name="/make_pairs")
    with pytest.raises(AppError, match="0 choices; a taste takes at least 4"):
        client.predict("polished", api_name="/fit_taste")
    given = [client.predict(side, api_name="/choose_picture") for side in ("left", "right", "left", "right")]
    return client, given, client.predict("polished", api_name="/fit_taste")


def test_choices_become_a_file_and_a_ranking(chosen, tmp_path):
    _, given, (download, ranking, _, code, took) = chosen
    assert [re.search(r"(\d) choice", facts)[1] for *_, facts in given] == ["1", "2", "3", "4"]
    assert all(left != right for left, right, _ in given[:-1])
    assert "Fitted to 4 choices" in took and "fit_personal_reward" in code
    assert [entry["caption"] for entry in ranking] == ["1", "2", "3", "4"]
    reward, pictures = load_reward(file_of(download)), [Image.open(entry["image"]) for entry in ranking]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255 for picture in pictures])
    scores = reward(pixels, "").tolist()
    assert scores == sorted(scores, reverse=True)
    assert Path(file_of(download)).name == "taste.safetensors" and load_reward(file_of(download))


def test_improve_climbs_the_taste_of_whom_it_is(chosen, app_url):
    client, _, (download, *_) = chosen
    file = handle_file(file_of(download))
    arguments = {"prompt": "a cat on a sky background", "reward": "taste", "iterations": 2, "model": "bundled"}
    *_, figures, code, status = client.predict(**arguments, taste=file, api_name="/improve")
    assert "Done" in status and 'load_reward("taste.safetensors"), 20.0' in code
    assert list(json.loads(Path(file_of(figures)).read_text())["terms"]) == ["my taste"]
    other = Client(app_url, verbose=False)
    with pytest.raises(AppError, match="no taste yet"):
        other.predict(**arguments, taste=None, api_name="/improve")
    with pytest.raises(AppError, match="no pictures yet"):
        other.predict("polished", api_name="/fit_taste")
