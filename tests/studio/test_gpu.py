"""ZeroGPU, with a stand-in for the package ``spaces`` that forks and pickles as it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.studio.create_job import CreateJob
from trimtab.studio.edit_job import EditJob
from trimtab.studio.gpu import on_gpu, on_zero_gpu, seconds_of
from trimtab.studio.improve_job import ImproveJob
from trimtab.studio.points_job import ReconstructJob
from trimtab.studio.points_source import Shape

SPACES = '''
"""Lends nothing, but forks for each call, pickles what goes in and out, and keeps what was asked for."""
import functools, inspect, multiprocessing, pickle

asked = []

def GPU(task=None, *, duration=None, size=None):
    assert task is None and callable(duration)
    return lambda function: lend(function, duration)

def lend(function, duration):
    assert inspect.isgeneratorfunction(function)

    @functools.wraps(function)
    def lent(*arguments):
        asked.append((duration(*arguments), arguments[2]))
        forked = multiprocessing.get_context("fork")
        results, sent = forked.SimpleQueue(), pickle.dumps(arguments)

        def work():
            try:
                for value in function(*pickle.loads(sent)):
                    results.put(pickle.dumps(value))
                results.put(None)
            except BaseException as error:
                results.put(repr(error))

        process = forked.Process(target=work, daemon=True)
        process.start()
        value = b""
        try:
            while (value := results.get()) is not None:
                assert isinstance(value, bytes), value
                yield pickle.loads(value)
        finally:
            while isinstance(value, bytes):  # left early: what still comes is read, so that the process can end
                value = results.get()
            process.join(60)
            assert process.exitcode == 0, process.exitcode

    return lent
'''
SCRIPT = """
import json
import spaces
import torch
from trimtab.studio import build
from trimtab.studio.create_job import CreateJob
from trimtab.studio.gpu import on_gpu
from trimtab.studio.limits import Limits
from trimtab.studio.points_job import SampleJob
from trimtab.studio.runs import MODEL, Stop, stream
from trimtab.studio.tab import Studio

torch.set_num_threads(1)
build()
told = {"loads": MODEL.loads}
studio = Studio(Limits(), on_gpu)
job = CreateJob("a cat on a sky background", steps=2)
*_, lent = studio.stream(job, None, "create")
*_, here = stream(job, Stop(), 600, 1024)
both = zip(lent.result.pictures, here.result.pictures, strict=True)
told["same"] = lent.finished and all(one[1].tobytes() == other[1].tobytes() for one, other in both)

long = studio.stream(CreateJob("a cat on a sky background", steps=100), None, "create")
told["notes"] = [next(long).note for _ in range(3)]
long.close()  # left early: the process must end by itself, within a step
told["wishes"] = len(list(studio.files.folder.glob("*stop*")))

*_, points = studio.stream(SampleJob(1, 0), None, "points")
told |= {"points": points.finished and not points.error, "asked": spaces.asked, "loads after": MODEL.loads}
print(json.dumps(told))
"""


def test_off_zero_gpu_nothing_is_wrapped(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)

    def stream():
        yield 1

    assert not on_zero_gpu() and on_gpu(stream) is stream


@pytest.mark.parametrize("value", ["1", "true", "T"])
def test_zero_gpu_is_told_by_its_variable(value, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", value)
    assert on_zero_gpu()


def test_seconds_grow_with_the_settings_and_stay_in_bounds():
    image = pytest.importorskip("PIL.Image").new("RGB", (64, 64))
    few = [CreateJob("a cat", steps=20), EditJob(image, "", "a cat", steps=10), ImproveJob("a cat", iterations=5)]
    many = [CreateJob("a cat", steps=60), EditJob(image, "", "a cat", steps=30), ImproveJob("a cat", iterations=20)]
    for short, long in zip(few, many, strict=True):
        assert 10 <= seconds_of(short) < seconds_of(long) <= 120, type(short)
    assert seconds_of(CreateJob("a cat", steps=100, grid=True)) == 120
    assert seconds_of(ReconstructJob(Shape("chair", 0))) == 10


def test_runs_are_lent_a_card_in_a_forked_process(tmp_path):
    """The model is loaded once, before; pictures are those of no fork; a run left early ends; points need no card."""
    (tmp_path / "spaces.py").write_text(SPACES)
    environment = {
        **os.environ,
        "SPACES_ZERO_GPU": "1",
        "OMP_NUM_THREADS": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["loads"] == told["loads after"] == 1
    assert told["same"] and told["points"]
    job, long = CreateJob("a", steps=2), CreateJob("a", steps=100)
    assert told["asked"] == [[seconds_of(job), seconds_of(job) - 4], [seconds_of(long), seconds_of(long) - 4]]
    assert len(told["notes"]) == 3 and told["wishes"] == 0
