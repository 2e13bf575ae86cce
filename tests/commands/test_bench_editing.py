"""``trimtab bench editing`` on few pictures: its files, and what it refuses."""

import json

import pytest

from trimtab.cli import main


def test_writes_what_it_measured(tmp_path, capsys):
    arguments = ["--num-pictures", "1", "--methods", "sdedit", "--budget", "6", "--output", str(tmp_path)]
    assert main(["bench", "editing", "--parts", "edits", "memory", *arguments]) == 0
    cells = json.loads((tmp_path / "editing.json").read_text())["cells"]
    assert {cell["method"] for cell in cells} == {"sdedit"}
    assert {cell["num_function_evaluations"] for cell in cells} == {6}
    memory = json.loads((tmp_path / "flowopt.json").read_text())["memory"]
    assert memory["none"]["latents"] < 4.5  # two on the device, and a best state of two on the host
    assert (tmp_path / "edit_fronts.png").is_file()
    shown = capsys.readouterr().out
    assert "| sdedit | strength 0.5 | 6 |" in shown and "autoencoder: " in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", "0"], "--budget takes a whole number, 1 or more; got 0"),
        (["--methods", "p2p"], "--methods takes "),
    ],
)
def test_refuses(arguments, message, tmp_path, capsys):
    assert main(["bench", "editing", *arguments, "--output", str(tmp_path)]) != 0
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
