"""FRUGAL against torch.optim at both ends of its density, and its projections against linear algebra."""

import math

import pytest
import torch
from torch import nn

from trimtab.optim import Frugal, frugal_param_groups
from trimtab.optim.training.projections import KINDS, active_blocks, draw

INDEX_KINDS = ("columns", "rows", "randk", "randperm", "blockwise")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def regression(make, steps):
    """The weights after some steps on ||X W^T - Y||^2, W (24, 16)."""
    X, Y = torch.randn(64, 16, generator=generator(1)), torch.randn(64, 24, generator=generator(2))
    W = nn.Parameter(torch.randn(24, 16, generator=generator(3)))
    optimizer = make([W])
    for _ in range(steps):
        optimizer.zero_grad()
        (X @ W.T - Y).square().mean().backward()
        optimizer.step()
    return W.detach(), optimizer


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_density_one_is_adamw(kind):
    expected, _ = regression(lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1), 30)
    found, _ = regression(lambda p: Frugal(p, 1e-2, weight_decay=0.1, density=1.0, projection=kind), 30)
    assert float((found - expected).abs().max()) < 2e-6


@pytest.mark.parametrize("dampening", [0.0, 0.9])
def test_density_one_is_sgd_with_momentum(dampening):
    expected, _ = regression(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=dampening), 30)
    found, _ = regression(lambda p: Frugal(p, 0.1, density=1.0, stateful="sgdm", dampening=dampening), 30)
    assert float((found - expected).abs().max()) < 2e-6


@pytest.mark.parametrize("kind", ["svd", "random"])
def test_density_one_in_a_rotated_basis_is_another_adamw(kind):
    expected, _ = regression(lambda p: torch.optim.AdamW(p, 1e-2), 30)
    found, _ = regression(lambda p: Frugal(p, 1e-2, density=1.0, projection=kind), 30)
    assert float((found - expected).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_density_zero_is_signsgd_to_the_bit_and_keeps_no_state(kind):
    found, optimizer = regression(lambda p: Frugal(p, 1e-2, weight_decay=0.1, density=0.0, projection=kind), 20)

    class SignSGD(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.copy_(p * (1 - 1e-2 * 0.1) - 1e-2 * p.grad.sign())

    expected, _ = regression(SignSGD, 20)
    assert torch.equal(found, expected)
    (state,) = optimizer.state.values()
    assert set(state) == {"step"}


def test_density_zero_is_sgd():
    expected, _ = regression(lambda p: torch.optim.SGD(p, 0.05), 20)
    found, _ = regression(lambda p: Frugal(p, 0.1, density=0.0, state_free="sgd", state_free_lr_scale=0.5), 20)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(24, 16), (12, 40)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "blockwise"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_coordinates_and_remainder_are_the_gradient_and_orthogonal(kind, side, shape):
    if side == "full" and kind in ("dct", "randperm"):
        pytest.raises(ValueError, Frugal, [nn.Parameter(torch.ones(shape))], projection=kind, side=side)
        return
    gradient = torch.randn(shape, generator=generator(4))
    projection, _ = draw(kind, side, 0.3, gradient, generator(5))
    low, rest = projection.split(gradient)
    part = projection.join(low, torch.zeros_like(gradient))
    assert 0 < low.numel() < gradient.numel()
    assert float((part * rest).sum()) == pytest.approx(0, abs=1e-6 * float(gradient.square().sum()))
    torch.testing.assert_close(projection.join(low, rest.clone()), gradient, rtol=1e-5, atol=2e-6)


def test_svd_leaves_the_least_remainder():
    gradient = torch.randn(40, 16, generator=generator(6))
    projection, _ = draw("svd", "std", 0.25, gradient, generator())
    values = torch.linalg.svdvals(gradient)
    assert float(projection.split(gradient)[1].norm()) == pytest.approx(float(values[4:].norm()), rel=1e-5)


def test_a_remainder_of_rounding_makes_no_step():
    """A gradient of rank 4 lies in 16 singular vectors; the sign of what rounding leaves would be a full step."""
    W = nn.Parameter(torch.zeros(64, 64))
    W.grad = torch.randn(64, 4, generator=generator(7)) @ torch.randn(4, 64, generator=generator(8))
    optimizer = Frugal([W], lr=1.0, projection="svd")
    optimizer.step()
    right = optimizer.state[W]["right"]
    step = W.detach()
    assert float((step - step @ right @ right.T).norm()) < 1e-4 * float(step.norm())


def test_the_state_of_a_quarter_of_the_columns():
    W = nn.Parameter(torch.zeros(512, 512))
    W.grad = torch.ones(512, 512)
    optimizer = Frugal([W])
    optimizer.step()
    numbers = {name: value.numel() for name, value in optimizer.state[W].items()}
    assert numbers == {"step": 1, "age": 1, "indices": 128, "exp_avg": 512 * 128, "exp_avg_sq": 512 * 128}


def test_what_has_no_state_moves_by_the_rate_and_the_rest_as_adam():
    W = nn.Parameter(torch.zeros(8, 8))
    optimizer = Frugal([W], lr=0.1, state_free_lr_scale=0.5)
    W.grad = torch.randn(8, 8, generator=generator(9))
    W.grad[:, 3] = 0
    optimizer.step()
    kept = optimizer.state[W]["indices"].long()
    expected = -0.05 * W.grad.sign()
    expected[:, kept] = -0.1 * W.grad[:, kept].sign()  # Adam's first step
    torch.testing.assert_close(W.detach(), expected, rtol=1e-4, atol=1e-6)


def test_without_a_state_free_rule_the_remainder_is_dropped():
    W = nn.Parameter(torch.zeros(8, 8))
    optimizer = Frugal([W], lr=0.1, state_free="none")
    W.grad = torch.ones(8, 8)
    optimizer.step()
    moved = W.detach().abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == optimizer.state[W]["indices"].tolist()


def test_the_subspace_changes_every_gap_and_the_moments_with_it():
    W = nn.Parameter(torch.zeros(16, 16))
    seen, ages = [], []
    optimizer = Frugal([W], lr=0.1, update_gap=3)
    for step in range(9):
        W.grad = torch.randn(16, 16, generator=generator(step))
        optimizer.step()
        seen.append(tuple(optimizer.state[W]["indices"].tolist()))
        ages.append(int(optimizer.state[W]["age"]))
    assert ages == [1, 2, 3] * 3
    assert len(set(seen)) == len(set(seen[::3])) == 3


def test_kept_moments_follow_their_columns():
    W = nn.Parameter(torch.zeros(16, 16))
    optimizer = Frugal([W], density=0.75, update_gap=1, reset_state=False, betas=(0.5, 0.5))
    full = torch.zeros(16, 16)
    for step in range(4):
        W.grad = torch.randn(16, 16, generator=generator(step))
        optimizer.step()
        chosen = torch.zeros(16, dtype=torch.bool)
        chosen[optimizer.state[W]["indices"].long()] = True
        full = torch.where(chosen, 0.5 * full + 0.5 * W.grad, 0.0)
        torch.testing.assert_close(optimizer.state[W]["exp_avg"], full[:, chosen])


@pytest.mark.parametrize("order", ["ascending", "descending", "mirror"])
@pytest.mark.parametrize(("count", "density"), [(8, 0.25), (7, 0.3), (5, 0.5)])
def test_blocks_take_turns(order, count, density):
    size = round(count * density)
    rounds = [active_blocks(order, count, density, refresh, generator()) for refresh in range(count)]
    assert all(len(active) == size for active in rounds)
    assert sorted(index for active in rounds for index in active) == sorted(list(range(count)) * size)
    first = {"ascending": set(range(size)), "descending": set(range(count - size, count))}
    assert rounds[0] == first.get(order, {0, count - 1} if size == 2 else rounds[0])


def test_only_active_blocks_hold_state():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(4)]
    optimizer = Frugal(params, projection="blockwise", density=0.5, update_gap=2, block_order="ascending")
    held = []
    for _ in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        held.append([number for number, p in enumerate(params) if "exp_avg" in optimizer.state[p]])
    assert held == [[0, 1], [0, 1], [2, 3], [2, 3], [0, 1], [0, 1]]


def test_the_excluded_group_is_plain_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    twin = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    twin.load_state_dict(model.state_dict())
    groups = frugal_param_groups(model, full_state=("2.",))
    assert [name for name, _ in groups[0]["params"]] == ["0.weight"]
    optimizers = [Frugal(groups, lr=1e-2), torch.optim.AdamW(twin.parameters(), 1e-2, weight_decay=0.0)]
    for step in range(3):
        for module in (model, twin):
            for number, p in enumerate(module.parameters()):
                p.grad = torch.randn(p.shape, generator=generator(10 * step + number))
        for optimizer in optimizers:
            optimizer.step()
    named = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name != "0.weight":
            torch.testing.assert_close(p, named[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(model[0].weight, twin[0].weight)


def test_kernels_are_matrices_of_their_first_axis():
    p = nn.Parameter(torch.zeros(8, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = Frugal([p], lr=0.1, projection="rows")
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (2, 12)
    torch.testing.assert_close(p.detach(), torch.full((8, 3, 2, 2), -0.1), rtol=1e-5, atol=1e-7)


def test_half_precision_is_warned_of():
    with pytest.warns(UserWarning, match="half precision"):
        Frugal([nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))])


def test_draws_follow_the_generator():
    def indices(seed):
        W = nn.Parameter(torch.zeros(4, 64))
        W.grad = torch.ones(4, 64)
        optimizer = Frugal([W], generator=generator(seed))
        optimizer.step()
        return optimizer.state[W]["indices"].tolist()

    assert indices(1) == indices(1) != indices(2)


def test_momentum_beside_sgd_keeps_the_rate_of_the_theorem():
    """Noise-free, L-smooth f, step <= (1 - b) / (L (4 - b + b^2)): the mean squared gradient falls at least as 1 / K.

    The theorem's constant hides in O(.); on a quadratic gradient descent's own 2 (f - f*) / (K step) must hold.
    """
    L, beta = 1.0, 0.9
    step = (1 - beta) / (L * (4 - beta + beta**2))
    scales = torch.logspace(-3, 0, 16)
    W = nn.Parameter(torch.randn(16, 16, generator=generator(11)))
    optimizer = Frugal(
        [W], lr=step, stateful="sgdm", momentum=beta, dampening=beta, state_free="sgd", update_gap=10, density=0.5
    )
    start, squares = float((0.5 * scales * W.detach().square()).sum()), []
    for _ in range(400):
        W.grad = (scales * W).detach()
        squares.append(float(W.grad.square().sum()))
        optimizer.step()
    for K in (50, 100, 200, 400):
        assert math.fsum(squares[:K]) / K <= 2 * start / (K * step)
