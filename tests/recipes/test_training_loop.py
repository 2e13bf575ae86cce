"""The training loop: interrupted and resumed runs end where undisturbed ones do."""

import json

import pytest
import torch
from torch import nn

from trimtab.recipes.curvature import stable_rate, with_curvature
from trimtab.recipes.training_loop import TrainingSettings, adamw, averaged_weights, train

SETTINGS = TrainingSettings(num_steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=2)


def regression(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of_step(module, step, draw, device):
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(draw))
    loss = (module(inputs).float() - inputs.sum(1, keepdim=True)).square().mean()
    return loss, {}


def two_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2}
    rest = ((name, p) for name, p in module.named_parameters() if name not in matrices)
    return [torch.optim.Muon(matrices.values(), 1e-2), adamw(rest, SETTINGS)]


@pytest.mark.parametrize("optimizers_of", [lambda module: None, two_optimizers], ids=["adamw", "muon and adamw"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, optimizers_of):
    whole = regression(0)
    assert train(whole, loss_of_step, SETTINGS, tmp_path / "whole", optimizers=optimizers_of(whole))

    calls = 0

    class Interrupted(Exception):
        pass

    def interrupting_loss(module, step, draw, device):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise Interrupted
        return loss_of_step(module, step, draw, device)

    settings = TrainingSettings(**{**SETTINGS.__dict__, "checkpoint_seconds": 0.0})
    first = regression(0)
    with pytest.raises(Interrupted):
        train(first, interrupting_loss, settings, tmp_path / "parts", optimizers=optimizers_of(first))
    assert json.loads((tmp_path / "parts" / "checkpoint.json").read_text())["step"] == 7
    resumed = regression(1)
    assert train(resumed, loss_of_step, settings, tmp_path / "parts", optimizers=optimizers_of(resumed))
    for expected, got in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    loaded = regression(2)
    assert averaged_weights(loaded, tmp_path / "parts") == 12
    for expected, got in zip(whole.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_max_seconds_stops_with_a_checkpoint(tmp_path):
    module = regression(0)
    assert not train(module, loss_of_step, SETTINGS, tmp_path, max_seconds=0.0)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 1


def test_the_rate_warms_up_then_falls_to_zero():
    settings = TrainingSettings(num_steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, decay_start=0.5)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(30) == settings.rate(50) == 1.0
    assert settings.rate(75) == pytest.approx(0.5)
    assert settings.rate(100) == pytest.approx(0.0)


def test_the_log_tells_the_rate_that_curvature_allows(tmp_path):
    settings = TrainingSettings(**{**SETTINGS.__dict__, "curvature": True, "log_every": 12, "mixed_precision": "no"})
    watched, plain = regression(0), regression(0)
    assert train(watched, loss_of_step, settings, tmp_path / "watched")
    assert train(plain, loss_of_step, SETTINGS, tmp_path / "plain")
    (row,) = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    for name in ("num_steps", "curvature"):
        assert name in json.loads((tmp_path / "watched" / "checkpoint.json").read_text())["settings"]
    assert 0 < row["stable_rate"] < 10 and row["step"] == 12
    linear = nn.Linear(3, 1, bias=False)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    exact = 2 / float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / 8)[-1])
    for compiled in (False, True):
        found = stable_rate(linear, loss_of_step, 0, 5, torch.device("cpu"), compiled=compiled)
        assert found == pytest.approx(exact, rel=1e-2)


def test_a_presets_settings_take_the_curvature_flag():
    from trimtab.recipes import train as recipe
    from trimtab.recipes import train_point_clouds

    parts = ("autoencoder", "transformer", "finish", "clip")
    preset = recipe.PRESETS["cpu"]
    assert all(getattr(with_curvature(preset), name).curvature for name in parts)
    clouds = with_curvature(train_point_clouds.PRESETS["cpu"], "flow_training")
    assert clouds.flow_training.curvature and not clouds.training.curvature
    assert not any(getattr(preset, name).curvature for name in parts)
