"""Settings inside pictures: there and back, and what strangers put there."""

import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trimtab.commands.pictures import save_png
from trimtab.studio.metadata import Embedded, checked_settings, made_by, plain_settings, read_embedded


@dataclass(frozen=True)
class Job:
    prompt: str
    seed: int = 0
    scale: float = 1.0
    words: tuple[str, ...] = ()
    reward: Mapping[str, float] = field(default_factory=dict)
    method: Literal["full", "free"] = "full"
    negative: str | None = None
    tiled: bool = False
    image: Image.Image | None = None


GOOD = Job("a cat", 5, 7.5, ("a", "b"), {"bundled": 2.0}, "free", None, True)


def picture(**texts: str) -> io.BytesIO:
    """A PNG with these text fields."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png", pnginfo=info)
    return file


def test_there_and_back(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (3, 2), "red"), path, made_by("improve", plain_settings(GOOD)))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.text["prompt"] == "a cat" and image.text["seed"] == "5"
        assert image.getpixel((0, 0)) == (255, 0, 0)
    found = read_embedded(path)
    assert found.tab == "improve"
    taken, left_out = checked_settings(Job, found.settings)
    assert left_out == []
    assert Job(**{**taken, "words": tuple(taken["words"])}) == GOOD


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    st.integers(0, 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
)
@settings(max_examples=20, derandomize=True, deadline=None)
def test_any_text_and_number_comes_back(text, seed, scale):
    file = io.BytesIO()
    made = {"prompt": text, "seed": seed, "scale": scale}
    info = PngInfo()
    info.add_itxt("settings", json.dumps(made))
    Image.new("RGB", (1, 1)).save(file, "png", pnginfo=info)
    assert read_embedded(file).settings == made
    assert checked_settings(Job, made) == (made, [])


def test_pictures_of_the_command_line_are_read(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (2, 2)), path, {"prompt": "an owl", "seed": 3, "settings": {"guidance": "apg"}})
    assert read_embedded(path) == Embedded("", {"guidance": "apg", "prompt": "an owl", "seed": 3})


def test_a_picture_is_no_setting():
    job = Job("a cat", image=Image.new("RGB", (2, 2)))
    assert "image" not in plain_settings(job) and plain_settings(job)["prompt"] == "a cat"
    assert checked_settings(Job, {"image": "/etc/passwd"}) == ({}, ["image"])


WRONG = {
    "prompt": [3, None, ["a"], {"a": 1}],
    "seed": ["3", 3.0, True, None],
    "scale": ["1", True, None, [1.0], 10**400],
    "words": ["ab", [1], {"a": "b"}],
    "reward": [[1.0], {"a": "1"}, {"a": True}, "bundled"],
    "method": ["other", 1, None],
    "negative": [1, False],
    "tiled": [0, 1, "yes"],
    "unknown": [1],
    "__class__": ["Job"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_are_left_out_and_named(name):
    for value in WRONG[name]:
        assert checked_settings(Job, {"prompt": "a cat", name: value})[1] == [name], value


def test_a_whole_number_is_a_number():
    assert checked_settings(Job, {"scale": 3}) == ({"scale": 3}, [])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG with this chunk before its pixels."""
    plain = picture().getvalue()
    return plain[:33] + chunk(kind, content) + plain[33:]


HOSTILE = {
    "no picture": b"{}",
    "nothing": b"",
    "a JPEG": lambda: _saved("jpeg"),
    "no settings": picture(prompt="a cat").getvalue(),
    "no JSON": picture(settings="{").getvalue(),
    "a list": picture(settings="[1]").getvalue(),
    "a NaN": picture(settings='{"scale": NaN}').getvalue(),
    "infinite": picture(settings='{"scale": -Infinity}').getvalue(),
    "nested": picture(settings='{"a":' * 500 + "1" + "}" * 500).getvalue(),
    "nested beyond the parser": picture(settings="[" * 9_999 + "]" * 9_999).getvalue(),
    "too long": picture(settings=json.dumps({"prompt": "a" * 30_000})).getvalue(),
    "a long text": picture(settings=json.dumps({"prompt": "a" * 5_000})).getvalue(),
    "too many": picture(settings=json.dumps({f"a{i}": 0 for i in range(100)})).getvalue(),
    "a number of many digits": picture(settings='{"seed": ' + "9" * 9_000 + "}").getvalue(),
    "a bomb": with_chunk(b"zTXt", b"settings\0\0" + zlib.compress(b"{" * 50_000_000, 9)),
    "a wrong length": with_chunk(b"tEXt", b"settings\0{}")[:50],
    "a huge picture": chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
}


def _saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_what_strangers_send_is_nothing(name, tmp_path):
    content = HOSTILE[name]
    content = content() if callable(content) else content
    if content.startswith(struct.pack(">I", 13)):
        content = b"\x89PNG\r\n\x1a\n" + content
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert read_embedded(path) is None
    assert read_embedded(tmp_path / "missing.png") is None


@given(st.binary(max_size=400), st.integers(0, 300))
@settings(max_examples=20, derandomize=True, deadline=None)
def test_damage_is_survived(noise, place):
    """Noise written over a good file gives nothing or plain settings, never an error."""
    whole = picture(settings='{"seed": 1}', tab="create").getvalue()
    found = read_embedded(io.BytesIO(whole[:place] + noise + whole[place + len(noise) :]))
    assert found is None or isinstance(found.settings, dict)


def test_a_tab_is_a_name_and_a_seed_a_number():
    for tab in ("../x", "a" * 50, "<b>", "a b"):
        assert read_embedded(picture(settings="{}", tab=tab)) == Embedded("", {})
    for seed in ("-1", "1e3", "9" * 30, "³"):
        assert read_embedded(picture(settings="{}", seed=seed)).settings == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"prompt": "a" * 5_000}, "a text of 5000"),
        ({f"a{i}": 1 for i in range(70)}, "70 settings"),
        ({"a": {"b": {"c": {"d": 1}}}}, "deeper"),
        ({"a": float("nan")}, "not JSON compliant"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(content, words):
    with pytest.raises(ValueError, match=words):
        made_by("create", content)
