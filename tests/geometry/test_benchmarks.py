"""The geometry's benchmarks on small sizes: the methods agree, and the reports are written."""

import json

import pytest

from benchmarks import geometry, geometry_flow, geometry_losses
from trimtab.cli import main


def test_the_three_methods_agree():
    rows = geometry.speed(repeats=1, clouds=3, points=64)
    assert [row["what"] for row in rows] == ["value", "value, gradient in x", "value, gradients in x and y"]
    assert all(row["largest relative difference"] < 1e-4 for row in rows)


def test_memory_is_seen():
    """A table of 2,000 x 2,000 distances and another for its squares are 32 MB; ours holds no such table."""
    dense = geometry.extra_memory("g.dense_chamfer(x, y)", 1, 2000)
    assert 25 < dense < 150
    assert geometry.extra_memory("g.chamfer_distance(x, y)", 1, 2000) < 10


def test_sliced_flows_end_nearer_than_chamfer(tmp_path):
    rows = geometry_flow.flow(tmp_path, quick=True)
    assert (tmp_path / "geometry_flow.png").is_file() and len(rows) == 15
    ends = {row["loss"]: row["exact W_2"] for row in rows}  # the last row of each loss
    assert ends["SW, 100 slices"] < ends["Chamfer"]


def test_the_table_of_losses_goes_on_where_it_was(tmp_path, monkeypatch):
    (row,) = geometry_losses.losses(tmp_path, quick=True, names=["ea-v-dsw"])
    assert row["loss"] == "ea-v-dsw" and 0 <= row["accuracy"] <= 1
    assert all(row[name] > 0 for name in ("CD", "SW", "EMD", "ms an iteration"))
    made = []
    whole = geometry_losses.run
    monkeypatch.setattr(geometry_losses, "run", lambda name, *rest: made.append(name) or whole(name, *rest))
    rows = geometry_losses.losses(tmp_path, quick=True, names=["sw", "ea-v-dsw"])
    assert made == ["sw"] and rows[1]["SW"] == row["SW"] != rows[0]["SW"]


@pytest.mark.slow
def test_command(tmp_path, capsys):
    parts = ["speed", "memory", "scaling", "chamfer"]
    assert main(["bench", "geometry", "--quick", "--parts", *parts, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "geometry.json").read_text())
    assert set(report) == {*parts, "machine"} and (tmp_path / "geometry_scaling.png").is_file()
    assert "| what | clouds |" in capsys.readouterr().out


@pytest.mark.slow
def test_speed_against_pot():
    """20 and 12 times by the benchmark on an idle machine; a crowded one gets some room."""
    rows = {row["what"]: row for row in geometry.speed(repeats=3, clouds=8, points=2048)}
    assert rows["value, gradient in x"]["times POT"] >= 8
    assert rows["value, gradients in x and y"]["times POT"] >= 5
