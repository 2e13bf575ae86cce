"""The four commands on JSONL files: alone, on several processes of ``accelerate launch``, and killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.cli import main
from trimtab.geometry import PointCloudAutoencoder, PointCloudReconstructionPipeline, save_point_cloud

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)

ROOT = Path(__file__).parents[2]
QUICK = {
    "generate": ["--guidance", "cfg", "--steps", "2", "--batch-size", "2"],
    "optimize": ["--steps", "1", "--guidance-scale", "1", "--num-optimization-steps", "2", "--batch-size", "2"],
    "edit": ["--steps", "2", "--iterations", "1", "--step-size", "0.1", "--batch-size", "2"],
    "reconstruct": ["--frames", "2", "--size", "16", "--batch-size", "2"],
}
ENDINGS = {
    "generate": [".png"],
    "optimize": [".png", "-strip.png", "-rewards.png", ".json"],
    "edit": [".png", "-strip.png", ".json"],
    "reconstruct": [".ply", ".png", ".gif"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model of each kind, two pictures and two clouds."""
    folder = tmp_path_factory.mktemp("given")
    tiny_pipeline("sd3").save_pretrained(folder / "sd3")
    torch.manual_seed(0)
    shape = {"num_points": 24, "latent_dim": 4, "encoder_channels": (8,), "decoder_channels": (8,)}
    PointCloudReconstructionPipeline(PointCloudAutoencoder(**shape).eval()).save_pretrained(folder / "points")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        save_point_cloud(torch.randn(40, 3, generator=torch.Generator().manual_seed(i)), folder / f"{i}.ply")
    return folder


def lines_of(command: str, count: int) -> list[dict]:
    animals = ["cat", "dog", "fox", "owl"]
    jobs = []
    for i in range(count):
        prompt = f"a {animals[i % 4]}"
        given = {
            "generate": {"prompt": prompt, "seed": i, "guidance_scale": 3 + i % 2},
            "optimize": {"prompt": prompt, "seed": i},
            "edit": {"image": f"{i % 2}.png", "source_prompt": "a cat", "prompt": prompt},
            "reconstruct": {"file": f"{i % 2}.ply", "seed": i},
        }
        jobs.append({"id": f"job{i}", **given[command]})
    return jobs


def arguments(command: str, folder: Path, lines: list[dict], output: Path) -> list[str]:
    file = folder / f"{command}-{len(lines)}-{output.name}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    model = folder / ("points" if command == "reconstruct" else "sd3")
    return [
        command,
        "--input",
        str(file),
        "--model",
        str(model),
        "--device",
        "cpu",
        "--output",
        str(output),
        *QUICK[command],
    ]


def manifest(output: Path) -> list[dict]:
    """Without what differs from run to run."""
    records = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    for record in records:
        record["figures"].pop("seconds", None)
    return records


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name != "manifest.jsonl"}


@pytest.mark.parametrize(
    "command", ["generate", "edit", "reconstruct", pytest.param("optimize", marks=pytest.mark.slow)]
)
def test_many_jobs_and_a_bad_one(command, folder, tmp_path, capsys):
    """Batches of two, and the fourth job's input is broken: the others come out as they do alone."""
    lines = lines_of(command, 4)
    broken = {"generate": {"height": 18}, "optimize": {"optimizer": "newton"}, "edit": {"image": "bad"}}
    (folder / "bad").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    (folder / "bad.ply").write_bytes(b"ply\n\xff")
    lines[3] |= broken.get(command, {"file": "bad.ply"})
    out = tmp_path / "out"
    assert main(arguments(command, folder, lines, out)) == 1
    assert "1 of 4" in capsys.readouterr().err
    records = manifest(out)
    assert [bool(record["error"]) for record in records] == [False] * 3 + [True]
    assert all(list(record) == ["job", "seed", "settings", "files", "figures", "error"] for record in records[:3])
    for i, record in enumerate(records[:3]):
        assert (record["job"], record["files"]) == (f"job{i}", [f"job{i}{ending}" for ending in ENDINGS[command]])
        assert record["seed"] == (None if command == "edit" else i) and record["figures"]
    assert set(files(out)) == {file for record in records for file in record["files"]}
    assert main(arguments(command, folder, lines[1:2], tmp_path / "alone")) == 0
    alone, together = (Image.open(path / "job1.png") for path in (tmp_path / "alone", out))
    assert abs(np.asarray(alone, int) - np.asarray(together, int)).max() <= 1


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_processes", "2", "--multi_gpu", "-m", "trimtab"]


@pytest.mark.slow
@pytest.mark.parametrize("command", QUICK)
def test_two_processes_make_what_one_makes(command, folder, tmp_path):
    lines = lines_of(command, 7)
    lines[6] |= {"id": "../job6"}
    assert main(arguments(command, folder, lines, tmp_path / "one")) == 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*LAUNCH, *arguments(command, folder, lines, tmp_path / "two")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr[-2000:]
    assert run.stderr.count("1 of 7") == 1
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    for record in one + two:
        record.pop("where", None)
        record["job"] = record["job"].rpartition("/")[2].partition(".jsonl ")[2] or record["job"]
    assert [record["job"] for record in two] == [*(f"job{i}" for i in range(6)), "line 7"] == [r["job"] for r in one]
    assert {tuple(record["files"]) for record in one} == {tuple(record["files"]) for record in two}
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert set(one) | {".trimtab.lock"} == set(two)
    for name in one:  # in this process there may be two threads, which round otherwise
        if name.endswith(".png") and "-" not in name:
            pictures = (np.asarray(Image.open(tmp_path / which / name), int) for which in ("one", "two"))
            assert abs(np.subtract(*pictures)).max() <= 1, name


SERVER = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, sys.argv.pop(1))
import torch
torch.set_num_threads(1)
from trimtab.cli import main
import trimtab.pipelines, trimtab.commands.sampling, trimtab.rewards, trimtab.geometry
for line in sys.stdin:  # each run is a process of its own, whose imports are paid once
    child = os.fork()
    if child == 0:
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(main(eval(line)))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", QUICK)
def test_killed_twenty_times(command, folder, tmp_path):
    """kill -9 at random moments, then on: file by file as in a run that was let be."""
    lines = lines_of(command, 60)
    server = [sys.executable, "-c", SERVER, str(ROOT)]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runs:

        def start(output: Path) -> int:
            runs.stdin.write(repr(arguments(command, folder, lines, output)) + "\n")
            runs.stdin.flush()
            return int(runs.stdout.readline())

        def ended() -> int:
            return int(runs.stdout.readline())

        def wait_for(count: int, output: Path) -> float:
            """Seconds until so many jobs are done."""
            began, path = time.monotonic(), output / "manifest.jsonl"
            while not path.exists() or path.read_bytes().count(b"\n") < count:
                time.sleep(0.002)
            return time.monotonic() - began

        start(tmp_path / "one")
        loading, working = wait_for(1, tmp_path / "one"), time.monotonic()
        assert ended() == 0
        batch = 2 * (time.monotonic() - working) / len(lines)
        chance, known = random.Random(0), 0
        for kill in range(20):
            child = start(tmp_path / "two")
            if kill % 2:
                wait_for(known + 1, tmp_path / "two")
                time.sleep(chance.uniform(0, 1.5 * batch))
            else:  # while it reads, looks what is done, loads
                time.sleep(chance.uniform(0, loading))
            os.kill(child, signal.SIGKILL)
            assert ended() == signal.SIGKILL, kill
            path = tmp_path / "two" / "manifest.jsonl"
            known = path.read_bytes().count(b"\n") if path.exists() else 0
        start(tmp_path / "two")
        assert ended() == 0
        runs.stdin.close()
    assert [r["job"] for r in manifest(tmp_path / "two")] == [r["job"] for r in manifest(tmp_path / "one")]
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert set(one) == set(two)
    differ = [name for name in one if one[name] != two[name]]
    # Of a batch that was cut in two the rest is made alone, which rounds otherwise.
    assert len(differ) <= 20 * len(ENDINGS[command]), differ
    for name in differ:
        if name.endswith(".png") and "-" not in name:
            pictures = (np.asarray(Image.open(tmp_path / which / name), int) for which in ("one", "two"))
            assert abs(np.subtract(*pictures)).max() <= 1, name
