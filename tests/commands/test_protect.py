"""``trimtab protect`` on small labelled pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from trimtab.cli import main


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for label, tint in (("day", 6), ("night", -6)):
        folder = tmp_path / "pictures" / label
        folder.mkdir(parents=True)
        for index in range(8):
            values = (128 + tint + rng.normal(0, 25, (8, 8, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(values).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


QUICK = ("--outer-steps", "2", "--inner-steps", "4")


def test_pictures_keep_within_the_strength_and_the_report_says_what_happened(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["protect", str(pictures), "--strength", "4/255", "--keep", "day", "--output", str(out), *QUICK]) == 0
    report = json.loads((out / "protection.json").read_text())
    changes = {
        label: [np.abs(read(out / label / f"{i}.png") - read(pictures / label / f"{i}.png")).max() for i in range(8)]
        for label in ("day", "night")
    }
    assert changes["day"] == [0] * 8 and set(changes["night"]) == {4} and report["max_change"] == "4/255"
    assert report["bayes_error"][-1] >= report["bayes_error"][0]
    stages = report["told_apart"]
    assert set(stages) == {"before", "after", "after_jpeg_85"} and set(stages["after"]["per_class"]) == {"day", "night"}
    assert stages["after"]["bandwidth"] == stages["before"]["bandwidth"]
    assert stages["after"]["estimate"] == pytest.approx(max(report["bayes_error"][1:]), abs=1e-4)
    assert report["pictures"]["day/0.png"] == "day" and report["psnr"]["least"] > 30
    assert "at most 4/255" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert main(["protect", str(pictures), "--strength", "4/255", "--keep", "day", "--output", str(out), *QUICK]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert "already" in capsys.readouterr().err


def test_labels_from_files_and_sizes(pictures, tmp_path):
    rows = [(f"{label}/{i}.png", label) for label in ("day", "night") for i in range(4)]
    table, lines = tmp_path / "labels.csv", tmp_path / "labels.jsonl"
    table.write_text("file,label\n" + "".join(f"{file},{label}\n" for file, label in rows))
    lines.write_text("".join(json.dumps({"file": file, "label": label}) + "\n" for file, label in rows))
    for labels in (table, lines):
        out = tmp_path / labels.suffix[1:]
        options = ["--labels", str(labels), "--resize", "6", "--output", str(out), *QUICK]
        assert main(["protect", str(pictures), *options]) == 0
        assert len(list(out.rglob("*.png"))) == 8 and read(out / "day" / "0.png").shape == (6, 6, 3)


def test_what_cannot_be_used_is_one_line(pictures, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(pictures / "day" / "odd.png")
    for options, words in (
        ([str(tmp_path / "none")], "is none"),
        ([str(pictures / "day")], "folder of pictures for each label"),
        ([str(pictures), "--strength", "0"], "1/255 to 64/255"),
        ([str(pictures), "--keep", "dusk"], "got dusk"),
        ([str(pictures), "--output", str(pictures / "new")], "outside of"),
        ([str(pictures), "--labels", str(tmp_path / "no.csv")], "No such file"),
        ([str(pictures), *QUICK], "9x9"),
    ):
        output = [] if "--output" in options else ["--output", str(tmp_path / "unused")]
        assert main(["protect", *options, *output]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "unused").exists()
