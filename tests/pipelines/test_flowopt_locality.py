"""Edits kept to where they are: the weights, their limits in every family, and the loop by hand."""

import pytest
import torch

from tests.pipelines.test_flowopt import PROMPTS, RUN, edit, pipe  # noqa: F401
from tests.pipelines.test_flowopt_families import NUMPY_IN_SCHEDULERS, ROWS, edit_call, flowopt, picture, stock_pipeline
from trimtab.pipelines.flowopt_locality import Locality
from trimtab.pipelines.flowopt_mask import MaskedPath
from trimtab.pipelines.flowopt_task import prepare_edit

pytestmark = pytest.mark.filterwarnings(NUMPY_IN_SCHEDULERS, "ignore:.torch.jit.script. is deprecated")


def test_weights_are_those_of_the_geman_mcclure_loss():
    generator = torch.Generator().manual_seed(0)
    y, value = torch.randn(2, 6, 5, generator=generator), torch.randn(2, 6, 5, generator=generator)
    local = Locality(0.4, y, MaskedPath())
    assert local.watch(value) is value
    m = (value - y).square().mean(-1, keepdim=True).requires_grad_()
    s = 0.4 * torch.stack([row.std() for row in y]).view(2, 1, 1)
    (m / (1 + m / s**2)).sum().backward()
    torch.testing.assert_close(local.weight, m.grad)
    torch.testing.assert_close(local.path.mask, (1 - m.grad).expand(2, 6, 5))
    torch.testing.assert_close(local.weighted(value), value * m.grad)


def test_places_are_averaged_with_their_neighbours_and_a_given_mask_is_multiplied():
    y, value = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4, 6, 6)
    path = MaskedPath()
    path.mask = torch.zeros(1, 1, 6, 6)
    path.mask[..., :3] = 1.0
    local = Locality(1.0, y, path)
    local.watch(value)
    energy = y.square().mean(1)
    around = sum(energy[0, i, j] for i in (1, 2, 3) for j in (2, 3, 4)) / 9  # of the place (2, 3)
    assert local.weight[0, 0, 2, 3].item() == pytest.approx(float((1 + around / y.std() ** 2) ** -2), rel=1e-5)
    assert not path.mask[..., 3:].any() and path.mask[..., :3].all()
    local.watch(value)  # the mask that was given is not lost, nor multiplied twice
    torch.testing.assert_close(path.mask[0, 0, :, :3], 1 - local.weight[0, 0, :, :3])


@pytest.mark.parametrize("name", ROWS)
def test_its_limits_are_the_source_and_the_free_edit(name):
    edited = flowopt(name, stock_pipeline(name))
    shared = {"image": picture(name), "num_inference_steps": 4, "strength": 0.75}
    call = edit_call(name) | shared | {"num_optimization_steps": 1, "step_size": 0.1}
    plain = list(edited.stream(**call))
    all_kept = list(edited.stream(**call, locality=1e6))
    nothing_kept = list(edited.stream(**call, locality=1e-6))
    target = prepare_edit(edited, **_of_task(call)).target
    torch.testing.assert_close(all_kept[1].latents, target, atol=1e-4, rtol=1e-4)
    assert (nothing_kept[1].latents - plain[0].latents).abs().max() < 1e-3 * plain[0].latents.abs().max()
    assert torch.equal(all_kept[0].latents, plain[0].latents)
    assert (plain[1].latents - target).abs().max() > 1e-3  # so that the first line can fail


def _of_task(call: dict) -> dict:
    return {k: v for k, v in call.items() if k not in ("num_optimization_steps", "step_size", "acceleration")}


def test_an_iterate_is_the_masked_pass_from_the_weighted_update(pipe):  # noqa: F811
    states = list(pipe.stream(picture("sd3"), step_size=0.3, num_optimization_steps=2, locality=0.5, **PROMPTS, **RUN))
    task = prepare_edit(pipe, picture("sd3"), PROMPTS["prompt"], PROMPTS["source_prompt"], local=True, **RUN)
    y, x0 = task.target, task.inverted(task.target)
    x, value = x0, task.flow(x0)
    for state in states[1:]:
        residual = value - y
        energy = torch.nn.functional.pad(residual.square().mean(1, keepdim=True), (1,) * 4, mode="replicate")
        energy = torch.nn.functional.unfold(energy, 3).mean(1).view_as(residual[:, :1])
        weight = (1 + energy / (0.5 * y.std()) ** 2) ** -2
        x = x - 0.3 * weight * residual
        task.path.mask, task.path.target, task.path.reference = (1 - weight).expand_as(y), y, x0
        value = task.flow(x)
        torch.testing.assert_close(state.noise, x)
        torch.testing.assert_close(state.latents, value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"locality": 0.0}, ValueError, "`locality` is 0.0"),
        ({"locality": float("nan")}, ValueError, "`locality` is nan"),
        ({"locality": "0.3"}, TypeError, "`locality` is a str"),
        ({"locality": 0.3, "acceleration": "anderson"}, ValueError, "takes 'none' with it"),
    ],
)
def test_bad_input_is_named(pipe, options, error, message):  # noqa: F811
    with pytest.raises(error, match=message):
        edit(pipe, **options)
