"""The recipe of the directions' network with a handful of steps: it resumes, and what it writes is used."""

import json

import pytest
import torch
from safetensors.torch import load_file

from trimtab.optim.solvers import DeepDirections, DirectionNet, GridPoisson, conjugate_directions
from trimtab.recipes import train_conjugate_directions as recipe
from trimtab.recipes.train_conjugate_directions import Domain, Preset, main, random_mask
from trimtab.recipes.training_loop import TrainingSettings

PRESET = Preset(
    net={"width": 6, "pairs": 1},
    training=TrainingSettings(60, 8, 1e-2, warmup_steps=5, weight_decay=0.0, ema_decay=0.9),
    sizes=(8, 16),
    size_steps=(50,),
    domains=3,
    ritz_vectors=20,
    unrolled=2,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.PRESETS, "cpu", PRESET)
        for name, stops in (("whole", []), ("parts", ["--max-seconds", "0"])):
            arguments = ["--preset", "cpu", "--folder", str(folder / name), "--output", str(folder / f"{name}-model")]
            if stops:
                main([*arguments, *stops])
                assert not (folder / f"{name}-model").exists()
            main(arguments)
    return folder


def test_it_learns_and_is_used(trained):
    model = trained / "whole-model"
    net = DirectionNet(**json.loads((model / "config.json").read_text()))
    net.load_state_dict(load_file(model / "model.safetensors"))
    A = GridPoisson(torch.ones(16, 16, dtype=torch.bool))
    b = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    counts = [
        conjugate_directions(A, b, propose=propose, max_iterations=300).iterations
        for propose in (DeepDirections(A, net), None, DeepDirections(A, DirectionNet(**PRESET.net)))
    ]
    assert counts[0] < 0.7 * counts[1] and counts[0] < 0.5 * counts[2]
    assert "16 |" not in (model / "README.md").read_text() and "| 64 |" in (model / "README.md").read_text()


def test_an_interrupted_run_ends_as_one_that_was_not(trained):
    whole, parts = (load_file(trained / f"{name}-model" / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_masks_are_various():
    masks = torch.stack([random_mask(32, torch.Generator().manual_seed(seed)) for seed in range(60)])
    shares = masks.float().mean((1, 2))
    assert (shares > 0).all() and shares.min() < 0.3 and shares.max() > 0.6 and len(shares.unique()) > 50
    square = Domain.draw(16, 10, 0, full=True)
    assert square.operator.mask.all() and square.vectors.shape == (10, 16, 16)
