"""LANTON against torch.optim.Muon, hand-worked scales, and the noise that it is to see."""

import math

import pytest
import torch
from torch import nn

from trimtab.optim import Lanton, dual_norm, lanton_param_groups
from trimtab.optim.training.dual_norms import dual_norms
from trimtab.optim.training.orthogonalize import newton_schulz


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_without_adaptation_it_is_torchs_muon(nesterov, scale):
    shapes = ((24, 16), (12, 40))
    params, twins = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    common = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": scale}
    optimizers = Lanton(params, min_scale=1.0, ns_dtype=torch.bfloat16, **common), torch.optim.Muon(twins, **common)
    for step in range(4):
        for set_of in (params, twins):
            for number, p in enumerate(set_of):
                p.grad = torch.randn(p.shape, generator=generator(10 * step + number))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all("previous_grad" not in state for state in optimizers[0].state.values())


def test_equal_noise_is_no_adaptation():
    def run(min_scale):
        params = [nn.Parameter(torch.ones(12, 8)) for _ in range(2)]
        optimizer = Lanton(params, lr=0.1, min_scale=min_scale, ns_dtype=torch.float32)
        for step in range(5):
            for p in params:
                p.grad = torch.randn(12, 8, generator=generator(step))
            optimizer.step()
            assert list(optimizer.layer_scales().values()) == [1.0, 1.0]
        return params

    assert all(torch.equal(a, b) for a, b in zip(run(0.0), run(1.0), strict=True))


def test_the_hand_example():
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizer = Lanton([("loud", params[0]), ("quiet", params[1])], noise_beta=0.0, min_scale=0.0)
    first = torch.eye(2)
    for change in (torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 0.0]))):
        params[0].grad, params[1].grad = first + change, first.clone()
        optimizer.step()
    scales = optimizer.layer_scales()
    assert scales["loud"] == pytest.approx(10**-0.25, abs=1e-6) and scales["quiet"] == 1.0


def test_dual_norms_against_their_definition():
    U, _ = torch.linalg.qr(torch.randn(8, 2, generator=generator(1)))
    assert float(dual_norm(U @ torch.diag(torch.tensor([2.0, 1.0])), "spectral")) == pytest.approx(6.0, rel=1e-5)
    G = torch.randn(6, 4, generator=generator(2))
    # A dual norm is the greatest inner product with the unit ball.
    polar = torch.linalg.svd(G, full_matrices=False)
    best = {
        "spectral": math.sqrt(6 / 4) * (polar[0] @ polar[2]),
        "sign": G.sign(),
        "rms": math.sqrt(24) * G / G.norm(),
    }
    for kind, direction in best.items():
        assert float(dual_norm(G, kind)) == pytest.approx(float((G * direction).sum()), rel=1e-5)
    with pytest.raises(ValueError, match="takes a matrix"):
        dual_norm(torch.ones(3), "spectral")
    with pytest.raises(ValueError, match="`kind` is 'nuclear'"):
        dual_norm(G, "nuclear")


def test_the_estimate_of_a_large_nuclear_norm_is_within_a_third():
    G = torch.randn(2, 300, 260, generator=generator(3))
    for value, matrix in zip(dual_norms(list(G), "spectral"), G, strict=True):
        exact = math.sqrt(300 / 260) * float(torch.linalg.svdvals(matrix).sum())
        assert 0.7 * exact < float(value) < 1.3 * exact


def test_orthogonalisation_of_stacks_and_of_zero():
    stack = torch.randn(3, 20, 12, generator=generator(4))
    together = newton_schulz(stack, dtype=torch.float32)
    for one, matrix in zip(together, stack, strict=True):
        torch.testing.assert_close(one, newton_schulz(matrix, dtype=torch.float32), rtol=1e-4, atol=1e-5)
        values = torch.linalg.svdvals(one)
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert float(newton_schulz(torch.zeros(4, 4)).abs().sum()) == 0
    with pytest.raises(ValueError, match="`matrices` has shape"):
        newton_schulz(torch.ones(3))


def noisy(make, steps, *, noises=(0, 0, 0, 10), option=1, seed=0, rate=None):
    """Quadratics of ||X||^2 / 2, X (16, 16), with gradient noise of norms `noises`."""
    source = generator(seed)
    params = [nn.Parameter(torch.randn(16, 16, generator=source)) for _ in noises]
    optimizer = make(params)
    for step in range(steps):
        draws = [[torch.randn(16, 16, generator=source) * noise / 16 for noise in noises] for _ in range(option)]
        for p, draw in zip(params, draws[0], strict=True):
            p.grad = p.detach() + draw
        references = {p: p.detach() + draw for p, draw in zip(params, draws[-1], strict=True)} if option == 2 else None
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step(reference_grads=references) if references else optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("option", [1, 2])
def test_the_noisy_layer_takes_smaller_steps(option):
    def make(params):
        return Lanton(params, lr=0.05, noise_beta=0.9, min_scale=0.0, weight_decay=0.0, adjust_lr_fn="dion")

    _, optimizer = noisy(make, 50, option=option)
    scales = list(optimizer.layer_scales().values())
    assert scales[3] < 0.4 and min(scales[:3]) > 0.9
    assert any("previous_grad" in state for state in optimizer.state.values()) == (option == 1)


def test_the_floor_holds_the_scale():
    _, optimizer = noisy(lambda params: Lanton(params, lr=0.05, alpha=0.01, min_scale=0.3, weight_decay=0.0), 5)
    assert min(optimizer.layer_scales().values()) == pytest.approx(0.3)


def test_an_unused_layer_sets_no_measure():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = Lanton(params, noise_beta=0.0, min_scale=0.0)
    for step in range(3):
        params[0].grad, params[1].grad = torch.randn(4, 4, generator=generator(step)), torch.zeros(4, 4)
        optimizer.step()
    assert optimizer.layer_scales()[0] == 1.0


def test_two_independent_gradients_estimate_twice_the_variance():
    """E ||G - G'||_*^2 = 2 s^2 d^2 for noise N(0, s^2) on d entries in the "rms" geometry."""
    p, s, d = nn.Parameter(torch.zeros(16)), 0.5, 16
    optimizer = Lanton([{"params": [p], "kind": "rms"}], lr=0.0, noise_beta=0.0, min_scale=0.0)
    source, squares = generator(5), []
    for _ in range(400):
        p.grad = s * torch.randn(16, generator=source)
        optimizer.step(reference_grads={p: s * torch.randn(16, generator=source)})
        squares.append(float(optimizer.state[p]["noise"]))
    assert sum(squares) / 400 == pytest.approx(2 * s**2 * d**2, rel=0.05)


def test_references_are_checked():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Lanton([("weight", p)])
    p.grad = torch.ones(4, 4)
    for references in ({}, {p: torch.ones(3)}):
        with pytest.raises(ValueError, match=r"`reference_grads` has .* for weight of shape \(4, 4\)"):
            optimizer.step(reference_grads=references)
    assert torch.equal(p, torch.ones(4, 4))


def test_kinds_step_along_their_own_directions():
    groups = lanton_param_groups(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)), weight_decay=0.0)
    by_name = {name: p for group in groups for name, p in group["params"]}
    optimizer = Lanton(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in by_name.items()}
    for p in by_name.values():
        p.grad = torch.randn(p.shape, generator=generator(6))
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in by_name.items()}
    torch.testing.assert_close(moved["0.weight"], -0.1 * by_name["0.weight"].grad.sign(), rtol=1e-4, atol=1e-6)
    assert float(moved["1.bias"].norm()) == pytest.approx(0.1 * math.sqrt(4), rel=1e-4)
    assert float(torch.linalg.matrix_norm(moved["1.weight"], 2)) < 0.1 * 0.2 * math.sqrt(4) * 1.3


@pytest.mark.parametrize("kind", ["spectral", "sign", "rms"])
def test_a_zero_gradient_moves_nothing(kind):
    p = nn.Parameter(torch.ones(16, 16))
    p.grad = torch.zeros(16, 16)
    Lanton([{"params": [p], "kind": kind}], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p, torch.ones(16, 16))


@pytest.mark.slow
def test_uneven_noise_rewards_layerwise_rates():
    """The sheet's toy, chosen in the method's favour: best of a grid <= 0.92 of the best fixed rate."""

    def best(min_scale):
        def final(rate, seed):
            def make(params):
                return Lanton(params, noise_beta=0.9, min_scale=min_scale, weight_decay=0.0, adjust_lr_fn="none")

            params, _ = noisy(make, 400, seed=seed, rate=rate)
            return float(sum(p.detach().square().sum() for p in params)) / 2

        return min(sum(final(rate, seed) for seed in range(3)) / 3 for rate in (0.03, 0.05, 0.08, 0.12, 0.2, 0.3))

    assert best(0.0) <= 0.92 * best(1.0)
