"""Curvature of a reward in noise space against a dense Hessian, and what the command reports of it."""

import json

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.tiny_pipelines import NUMPY_IN_SCHEDULERS, tiny_pipeline
from trimtab.cli import main
from trimtab.pipelines import GenerationMap, NoiseOptimizationPipeline
from trimtab.pipelines.noise_curvature import noise_curvature
from trimtab.rewards import CallableReward

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS)
CALL = {"num_inference_steps": 2, "guidance_scale": 4.0}


def contrast(images, prompts):
    return 100 * images.var((1, 2, 3))


def test_the_largest_eigenvalue_is_scipys():
    reward = CallableReward(contrast, differentiable=True)
    pipe = NoiseOptimizationPipeline.from_pipe(tiny_pipeline("sd3"), reward=reward)
    f = GenerationMap(pipe, "a cat", gradient_checkpointing=False, **CALL)
    z = f.sample_latents(2, torch.Generator().manual_seed(0)).float()
    n = z[0].numel()
    found = noise_curvature(pipe, ["a cat", "a dog"], z, num_steps=25, **CALL)

    def product(v):  # the Hessian's, by torch's own double backward
        with sdpa_kernel(SDPBackend.MATH):
            direction = torch.from_numpy(v).float().view_as(z[:1])
            result = torch.autograd.functional.vhp(lambda x: -contrast(f(x), None).sum(), z[:1], direction)[1]
        return result.flatten().double().numpy()

    exact = float(eigsh(LinearOperator((n, n), product, dtype="float64"), 1, which="LA", tol=1e-3, ncv=8)[0][0])
    assert len(found) == 2 and found[0].size == n and found[0].num_products == 25
    assert found[0].lambda_max == pytest.approx(exact, rel=2e-3)
    assert found[1].lambda_max != pytest.approx(found[0].lambda_max, rel=1e-3)  # another prompt and noise
    rough = noise_curvature(pipe, "a cat", z[:1], num_steps=10, method="finite_difference", **CALL)
    assert rough[0].lambda_max == pytest.approx(exact, rel=0.1)
    with pytest.raises(ValueError, match="one that has a gradient"):
        noise_curvature(pipe, "a cat", z[:1], reward=CallableReward(contrast), **CALL)


def test_optimize_reports_it(tmp_path, capsys):
    model, output = tmp_path / "tiny", tmp_path / "out"
    tiny_pipeline("sd3").save_pretrained(model)
    quick = ["--steps", "2", "--guidance-scale", "4", "--num-optimization-steps", "2", "--device", "cpu"]
    code = main(["optimize", *quick, "--model", str(model), "--output", str(output), "--curvature", "a cat"])
    assert code == 0
    (name,) = output.glob("*.json")
    content = json.loads(name.read_text())
    curvature = content["curvature"]
    assert curvature["lambda_max"] > curvature["lambda_min"] and 1 <= curvature["products"] <= 20
    assert content["files"][-1].endswith("-curvature.png") and (output / content["files"][-1]).exists()
    assert "steps below" in capsys.readouterr().out
