"""The benchmark's own measures, on things that are known."""

import gc

import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.benchmarks import flowopt
from trimtab.pipelines import FlowOptPipeline

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)


@pytest.fixture(scope="module")
def pipe():
    edit = FlowOptPipeline.from_pipe(tiny_pipeline("sd3"))
    edit.set_progress_bar_config(disable=True)
    return edit


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), [
        "a red cat",
        "two dog",
        "a blue house",
    ]


def test_pictures_are_the_edit_benchmarks():
    images, captions = flowopt.load_pictures(3)
    assert images.shape == (3, 3, 128, 128) and len(captions) == 3
    assert images.min() >= 0 and images.max() <= 1
    assert [len(part) for part, _ in flowopt.batches(images, captions, 2)] == [2, 1]


def test_the_peak_is_what_is_alive_at_once():
    gc.collect()
    with flowopt.PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1  # two at once
        del a
        c = b.view(10, 100)  # no memory of its own
        b = c * 2
        del c
        b = b[:10].clone()
    assert memory.peak == 2 * 4000


def test_residuals_and_their_shares(pipe, pictures, monkeypatch):
    monkeypatch.setattr(flowopt, "STEPS", 3)
    monkeypatch.setattr(flowopt, "ITERATIONS", 16)
    monkeypatch.setattr(flowopt, "PLAIN_STEP_SIZES", (0.05, 0.1))
    report = flowopt.measure_residuals(pipe, *pictures)
    assert set(report["curves"]) == {"plain 0.05", "plain 0.1", "anderson", "inverse"}
    plain = report["curves"]["plain 0.1"]
    assert plain["passes"] == list(range(17)) and report["plain_best_8"] == plain["residuals"][8]
    inverse = report["curves"]["inverse"]
    assert inverse["passes"][1] == pytest.approx(1 + 4 / 3)  # a pass of Uni-Inv and one of the sampler
    assert report["inverse"]["residual_at_16_over_plain"] < 1e-2
    first = next(p for p, r in zip(inverse["passes"], inverse["residuals"], strict=True) if r <= plain["residuals"][8])
    assert report["inverse"]["share_of_passes"] == first / 8
    estimated = report["curves"]["anderson"]["passes"]
    assert estimated[0] == 2 and estimated[-1] == 18  # the step size's estimate is paid for


def test_psnr_has_its_ceiling(pipe, pictures, monkeypatch):
    monkeypatch.setattr(flowopt, "STEPS", 3)
    report = flowopt.measure_psnr(pipe, *pictures)
    assert report["inverse"]["psnr"][-1] == pytest.approx(report["ceiling"], abs=1e-2)
    assert report["inverse"]["evaluations_within_1_db"] <= report["inverse"]["evaluations"][1]


def test_time_and_memory_are_ratios(pipe, pictures):
    times = flowopt.measure_time(pipe, *pictures, repeats=1)
    assert times["ratio"] == times["run_seconds"] / times["network_seconds"] > 0.5
    memory = flowopt.measure_memory(pipe, *pictures)
    for acceleration in ("none", "anderson", "inverse"):
        figures = memory[acceleration]
        assert figures["ratio"] == pytest.approx(figures["bytes"] / memory["sampling_bytes"])
        assert figures["latents"] == pytest.approx(
            (figures["bytes"] - memory["sampling_bytes"]) / memory["latent_bytes"]
        )
