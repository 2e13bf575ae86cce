"""Powerprop against its closed form, measures of solutions against hand examples, Shampoo against its formula."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trimtab.optim import (
    PowerProp,
    apply_powerprop,
    class_similarity,
    collect_features,
    effective_rank,
    forgetting_report,
    magnitude_prune_,
    preconditioned_optimizer,
    remove_powerprop,
    solution_report,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_effective_rank_of_known_spectra():
    q, _ = torch.linalg.qr(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    assert effective_rank(q, center=False) == pytest.approx(16.0, abs=1e-4)
    line = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 5))
    assert effective_rank(line, center=False) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])), center=False) == pytest.approx(2**1.5)
    assert effective_rank(torch.ones(5, 3)) == 0.0 and effective_rank(torch.zeros(5, 3), center=False) == 0.0
    assert effective_rank(torch.randn(5, 50)) <= 4 + 1e-9  # centred


def test_powerprop_is_a_preconditioner_to_second_order():
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    errors = []
    with pytest.warns(UserWarning, match="first sign"):
        power = PowerProp(2.0)
    for rate in (1e-3, 1e-4):
        v = nn.Parameter(w.sign() * w.abs().sqrt())
        (power(v) * g).sum().backward()
        torch.optim.SGD([v], rate).step()
        exact = w.sign() * w.abs().sqrt()
        exact = exact - rate * 2 * exact.abs() * g
        torch.testing.assert_close(v.detach(), exact, rtol=0, atol=1e-12)
        moved = power(v).detach()
        errors.append(float((moved - (w - rate * 4 * w.abs() * g)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(100, abs=5) and errors[0] < 1e-3


def test_powerprop_has_a_gradient_at_zero():
    v = torch.tensor([0.0, -0.5], requires_grad=True, dtype=torch.float64)
    PowerProp(1.5)(v).sum().backward()
    assert v.grad[0] == 0.0 and v.grad[1] == pytest.approx(1.5 * 0.5**0.5)
    assert torch.autograd.gradcheck(PowerProp(1.3), torch.randn(6, dtype=torch.float64, requires_grad=True))


def train(model, steps=5):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return inputs


def test_alpha_one_changes_nothing_and_all_comes_off_again():
    plain, powered = net(), net()
    assert apply_powerprop(powered, 1.0) == ["0.weight", "2.weight"]
    train(plain)
    train(powered)
    remove_powerprop(powered)
    assert all(torch.equal(v, powered.state_dict()[k]) for k, v in plain.state_dict().items())
    model, inputs = net(), torch.randn(4, 6)
    before, outputs = copy.deepcopy(model.state_dict()), model(inputs)
    apply_powerprop(model, 1.5)
    assert "0.parametrizations.weight.original" in model.state_dict()
    torch.testing.assert_close(model(inputs), outputs)
    remove_powerprop(model)
    assert set(model.state_dict()) == set(before)
    for key, value in before.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-6)


def test_loras_first_matrix_takes_it_and_its_zero_one_is_refused_by_name():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=True), net())
    with pytest.raises(ValueError, match="0.lora_B.default.weight"):
        apply_powerprop(model, 1.5, filter=lambda name, _: "lora_" in name)
    assert not any("parametrizations" in key for key in model.state_dict())
    names = apply_powerprop(model, 1.5, filter=lambda name, _: "lora_A" in name)
    assert names == ["0.lora_A.default.weight"]
    train(model)
    remove_powerprop(model)
    with pytest.raises(ValueError, match="non-zero starts"):
        PowerProp(1.5).right_inverse(torch.zeros(3))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_pruning_sets_the_smallest_to_zero(scope):
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = magnitude_prune_(model, 0.5, scope=scope)
    assert set(parts) == {"0.weight", "2.weight"}
    kept = torch.cat([p[p != 0].abs() for p in (model[0].weight, model[2].weight)])
    gone = torch.cat([before[n][model.get_parameter(n) == 0].abs() for n in parts])
    assert len(gone) == 36
    if scope == "global":
        assert float(gone.max()) <= float(kept.min().detach())
    else:
        assert list(parts.values()) == [0.5, 0.5]
    assert torch.equal(model[0].bias, before["0.bias"])


def test_similarity_of_classes():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    similarity = class_similarity(features, torch.tensor([7, 7, 3, 5]))
    expected = [[1, 0.5**0.5, 0], [0.5**0.5, 1, 0.5**0.5], [0, 0.5**0.5, 1]]
    torch.testing.assert_close(similarity, torch.tensor(expected, dtype=torch.float64))
    with pytest.warns(UserWarning, match="mean 0"):
        dead = class_similarity(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert dead.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_forgetting():
    report = forgetting_report([[0.9, 0], [0.5, 0.8]])
    assert report.average == pytest.approx(0.65) and report.forgetting == pytest.approx(0.4)
    assert report.backward_transfer == pytest.approx(-0.4)
    three = forgetting_report([[0.5, 9, 9], [0.7, 0.6, 9], [0.6, 0.9, 1.0]])
    assert three.forgetting == pytest.approx((0.1 + 0) / 2)
    assert three.backward_transfer == pytest.approx((0.1 + 0.3) / 2)


def test_features_of_a_layer():
    model = net().train()
    batches = [(torch.randn(4, 6), torch.arange(4)) for _ in range(3)]
    features, labels = collect_features(model, batches, "1", max_batches=2)
    assert features.shape == (8, 8) and labels.tolist() == [0, 1, 2, 3] * 2 and model.training
    torch.testing.assert_close(features[:4], model[:2](batches[0][0]).detach())


def test_a_solution_is_compared_with_its_start():
    model = net()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(torch.outer(torch.ones(8), torch.ones(6)))
        model[2].weight.zero_()
        model[2].weight[0, 0] = 1.0
    report = solution_report(model, start)
    assert report.effective_rank["0.weight"] == pytest.approx(1.0, abs=1e-3)
    assert report.distance["0.weight"] == pytest.approx(48**0.5, rel=1e-5)
    assert report.relative_distance["0.weight"] == pytest.approx(48**0.5 / float(start["0.weight"].norm()), rel=1e-5)
    assert report.sparsity["2.weight"] == pytest.approx(23 / 24) and report.sparsity["0.weight"] < 0.1
    assert report.means()["sparsity"] == pytest.approx(sum(report.sparsity.values()) / 2)
    with pytest.raises(ValueError, match="nothing for '2.weight'"):
        solution_report(model, {"0.weight": start["0.weight"]})


def test_shampoo_is_the_formula():
    """W - lr L^(-1/4) G R^(-1/4) with L and R the sums of G G^T and G^T G, as its first step takes it."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.zeros(3, 4))
    optimizer = preconditioned_optimizer("shampoo", [w], 0.1, matrix_eps=1e-6)
    gradient = torch.randn(3, 4, generator=generator)

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix.double())
        return vectors @ torch.diag(values.clamp_min(1e-12) ** -0.25) @ vectors.T

    left = gradient @ gradient.T + 1e-6 * torch.eye(3)
    right = gradient.T @ gradient + 1e-6 * torch.eye(4)
    w.grad = gradient.clone()
    optimizer.step()
    expected = -0.1 * root(left) @ gradient.double() @ root(right)
    torch.testing.assert_close(w.detach().double(), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "rate"), [("shampoo", 1.0), ("soap", 0.1)])
def test_preconditioned_optimizers_reach_a_quadratics_minimum(name, rate):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 8, generator=generator)
    w = nn.Parameter(torch.ones(4, 8))
    optimizer = preconditioned_optimizer(name, [w], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (a @ w.T).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    assert losses[-1] < 1e-3 * losses[0]


def test_bad_input_is_named():
    features = torch.randn(4, 2)
    cases = [
        (lambda: PowerProp(0.9), ValueError, "`alpha` is 0.9"),
        (lambda: apply_powerprop(net(), names=("gain",)), ValueError, "'gain'"),
        (lambda: magnitude_prune_(net(), 1.0), ValueError, "`sparsity` is 1"),
        (lambda: magnitude_prune_(net(), -0.1), ValueError, "`sparsity`"),
        (lambda: magnitude_prune_(net(), 0.5, scope="row"), ValueError, "`scope`"),
        (lambda: effective_rank(torch.ones(3, 3, dtype=torch.long)), TypeError, "int64"),
        (lambda: effective_rank(torch.full((2, 2), math.nan)), ValueError, "not finite"),
        (lambda: effective_rank(torch.ones(3)), ValueError, "two axes"),
        (lambda: class_similarity(features, torch.zeros(3)), ValueError, "`labels` has shape"),
        (lambda: class_similarity(features, torch.zeros(4)), ValueError, "1 class"),
        (lambda: forgetting_report([[1.0, 2.0]]), ValueError, "square"),
        (lambda: collect_features(net(), [], "9"), ValueError, "`layer` is '9'"),
        (lambda: collect_features(net(), [], "1"), ValueError, "no batch"),
        (lambda: preconditioned_optimizer("kfac", []), ValueError, "'shampoo', 'soap'"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    model = net()
    apply_powerprop(model, 1.5)
    with pytest.raises(ValueError, match="remove_powerprop"):
        magnitude_prune_(model, 0.5)
