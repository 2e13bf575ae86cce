"""Codes refined under a distance: they find what the decoder can make, and don't influence one another."""

import pytest
import torch

from trimtab.geometry import REFINEMENT_LOSSES, PointCloudAutoencoder, chamfer_distance, refine_latents


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PointCloudAutoencoder(48, latent_dim=6, encoder_channels=(16,), decoder_channels=(64,)).eval()


def codes(count, seed=0):
    found = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(found, dim=1)


@pytest.mark.parametrize("loss", REFINEMENT_LOSSES)
def test_what_the_decoder_made_is_found_again(loss, model):
    """The target is the decoder's own, so the least loss is 0; nearest neighbours alone get stuck on the way."""
    with torch.no_grad():
        target = model.decode(codes(1, seed=1)).sample
    first, *_, last = refine_latents(model, codes(1), target, loss=loss, num_steps=60, learning_rate=0.05)
    assert first.step == 0 and last.step == 60
    assert last.best_losses < (0.6 if loss == "chamfer" else 0.05) * first.losses
    torch.testing.assert_close(last.best_latents.norm(dim=1), torch.ones(1))
    with torch.no_grad():
        again = model.decode(last.best_latents).sample
    torch.testing.assert_close(again, last.best_clouds)
    torch.testing.assert_close(REFINEMENT_LOSSES[loss](again, target), last.best_losses)


def test_the_best_never_gets_worse_and_the_first_is_the_start(model):
    target = 0.5 * torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(2))
    states = list(refine_latents(model, codes(2), target, loss="chamfer", num_steps=15, learning_rate=0.5))
    best = torch.stack([state.best_losses for state in states])
    assert torch.equal(best, torch.stack([state.losses for state in states]).cummin(0).values)
    torch.testing.assert_close(states[0].losses, chamfer_distance(model.decode(codes(2)).sample, target))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_gives_what_its_clouds_give_alone(model):
    target = 0.5 * torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(2))
    *_, both = refine_latents(model, codes(2), target, num_steps=10)
    for row in range(2):
        *_, alone = refine_latents(model, codes(2)[row : row + 1], target[row : row + 1], num_steps=10)
        torch.testing.assert_close(alone.best_latents[0], both.best_latents[row])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss": "other"}, ValueError, "takes one of sliced_wasserstein"),
        ({"num_steps": -1}, ValueError, "whole number >= 0, got -1"),
        ({"learning_rate": float("nan")}, ValueError, "> 0, got nan"),
        ({"clouds": torch.zeros(1, 4, 3)}, ValueError, r"got \(2, 6\) and \(1, 4, 3\)"),
        ({"clouds": torch.full((2, 4, 3), float("nan"))}, ValueError, "finite"),
        ({"clouds": [1]}, TypeError, "torch.Tensor"),
    ],
)
def test_bad_arguments_are_told_at_the_call(change, error, words, model):
    arguments = {"latents": codes(2), "clouds": torch.zeros(2, 4, 3), **change}
    with pytest.raises(error, match=words):
        refine_latents(model, **arguments)
