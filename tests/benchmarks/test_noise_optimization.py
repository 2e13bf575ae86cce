"""The benchmark's own figures, on cells whose figures are known, and one cell on a tiny model."""

import numpy as np
import pytest
import torch

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.benchmarks import noise_optimization
from trimtab.pipelines import NoiseOptimizationPipeline
from trimtab.recipes.emoji_scenes import check_scene, parse_caption
from trimtab.rewards import CallableReward


def cell(rewards, right):
    clocks = {"seconds": 2.0, "cpu_seconds": 3.0}
    return {"rewards": rewards, "right": right, "norms": [1.0] * len(rewards), **clocks}


def test_captions_are_compositional_and_held_out():
    captions = noise_optimization.compositional_captions(30)
    facts = [parse_caption(caption) for caption in captions]
    assert all(item.is_held_out() for item in facts)
    kinds = [noise_optimization._category(caption) for caption in captions]
    assert [kinds.count(name) for name in noise_optimization.CATEGORIES] == [10, 10, 10]
    assert captions == noise_optimization.compositional_captions(40)[:30]  # more captions begin alike


def test_errors_removed_are_counted_over_the_captions_of_all_methods():
    captions = noise_optimization.compositional_captions(6)
    rising = [[0.0, 3.0, 1.0, 4.0]] * 3
    flat = [[0.0, 1.0, 1.0, 1.0]] * 3
    cells = {
        "best of n/0": cell(flat, {"1": [0, 0, 1], "4": [0, 1, 1]}),
        "best of n/3": cell(flat, {"1": [0, 1, 0], "4": [0, 1, 0]}),
        "default/0": cell(rising, {"1": [0, 0, 1], "4": [1, 1, 1]}),
        "default/3": cell(rising, {1: [0, 1, 0], 4: [1, 1, 0]}),
        "best of n/6": cell(flat, {"1": [0, 0, 0], "4": [0, 0, 0]}),  # the other method hasn't run these
    }
    result = noise_optimization.summary(cells, captions)
    assert result["captions"] == 6
    default, best = result["methods"]["default"], result["methods"]["best of n"]
    assert default["right"] == {"1": pytest.approx(2 / 6), "4": pytest.approx(5 / 6)}
    assert default["errors_removed"]["share"] == pytest.approx(3 / 4)
    assert best["errors_removed"]["share"] == pytest.approx(1 / 4)
    assert default["errors_removed_of_best_of_n"]["share"] == pytest.approx(2 / 3)
    low, high = default["errors_removed"]["interval"]
    assert 0 <= low < 3 / 4 < high <= 1
    assert default["reward"]["4"] == 4.0  # the best so far, not the last
    assert default["per_iteration_and_picture"] == pytest.approx({"seconds": 4.0 / 24, "cpu_seconds": 6.0 / 24})
    assert sum(default["by_category"].values()) / 3 == pytest.approx(5 / 6)
    assert "| default |" in noise_optimization.table(result)


@pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:the model does not know:UserWarning")
def test_a_cell_is_the_pipelines_run_and_the_judges_verdict():
    red = CallableReward(lambda images, prompts: images[:, 0].mean((1, 2)), True)
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward=red)
    pipe.set_progress_bar_config(disable=True)
    captions = noise_optimization.compositional_captions(2)
    made = noise_optimization.run_cell(pipe, captions, 4, {"preset": "paper"}, 3)
    out = pipe(
        captions,
        preset="paper",
        num_optimization_steps=3,
        generator=[torch.Generator().manual_seed(noise_optimization.SEED + 4 + row) for row in range(2)],
        num_inference_steps=noise_optimization.STEPS,
        guidance_scale=noise_optimization.SCALE,
        max_sequence_length=16,
        output_type="pt",
    )
    assert np.allclose(np.array(made["rewards"]).T, out.rewards, atol=1e-4)
    assert list(made["right"]) == [1, 3]
    assert made["right"][3] == [verdict.correct for verdict in check_scene(out.images, captions)]
