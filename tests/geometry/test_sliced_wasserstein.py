"""Sliced Wasserstein against POT, closed forms, brute force and its own slow path."""

import itertools

import numpy as np
import ot
import pytest
import torch

from trimtab.geometry import SlicedTarget, sample_directions, sliced_wasserstein, wasserstein_1d
from trimtab.geometry.sliced_wasserstein import _BACKENDS


def clouds(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def directions(count, dim, seed=7, dtype=torch.float32):
    return sample_directions(count, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pot(x, y, theta, p):
    """POT's distance to the power of p, cloud by cloud."""
    return torch.stack(
        [ot.sliced_wasserstein_distance(a, b, projections=theta.T, p=p) ** p for a, b in zip(x, y, strict=True)]
    )


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("other", [200, 77])
@pytest.mark.parametrize("backend", _BACKENDS)
def test_equals_pot_in_value_and_gradient(backend, other, p):
    theta = directions(20, 3)
    ours, theirs = ([clouds(3, 200, 3), clouds(3, other, 3, seed=1)] for _ in range(2))
    for tensor in (*ours, *theirs):
        tensor.requires_grad_()
    value = sliced_wasserstein(*ours, projections=theta, p=p, backend=backend)
    expected = pot(*theirs, theta, p)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-6)
    weights = torch.tensor([1.0, 2.0, -3.0])
    for mine, reference in zip(
        torch.autograd.grad((weights * value).sum(), ours),
        torch.autograd.grad((weights * expected).sum(), theirs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_one_dimension_with_weights_equals_pot(backend, p):
    x, y = clouds(2, 40, 1, dtype=torch.float64), clouds(2, 25, 1, seed=1, dtype=torch.float64)
    a, b = (clouds(2, n, seed=n, dtype=torch.float64).abs() for n in (40, 25))
    value = sliced_wasserstein(x, y, x_weights=a, y_weights=b, p=p, backend=backend)
    for i in range(2):
        arguments = (v.numpy() for v in (x[i, :, 0], y[i, :, 0], a[i] / a[i].sum(), b[i] / b[i].sum()))
        assert value[i].item() == pytest.approx(float(ot.wasserstein_1d(*arguments, p=p)), abs=1e-9)


@pytest.mark.parametrize("backend", ["numpy", "torch", "autograd"])
def test_small_clouds_against_all_permutations(backend):
    """The sorted matching is the best of all: brute force over 5! in one dimension."""
    u, v = clouds(5), clouds(5, seed=3)
    best = min((u - v[list(order)]).abs().pow(3).mean().item() for order in itertools.permutations(range(5)))
    value = sliced_wasserstein(u[:, None], v[:, None], p=3, backend=backend)
    assert value.item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "torch", "autograd"])
@pytest.mark.parametrize(("n", "m", "weighted"), [(6, 6, False), (6, 4, False), (6, 5, True)])
def test_gradients_in_points_and_directions(backend, n, m, weighted):
    x, y, theta = (
        t.requires_grad_()
        for t in (
            clouds(2, n, 3, dtype=torch.float64),
            clouds(2, m, 3, seed=1, dtype=torch.float64),
            directions(4, 3, dtype=torch.float64),
        )
    )
    weights = {"x_weights": clouds(2, n, seed=2).abs(), "y_weights": clouds(2, m, seed=3).abs()} if weighted else {}
    for p in (1, 2, 3):

        def function(x, y, theta, p=p):
            return sliced_wasserstein(x, y, projections=theta, p=p, backend=backend, root=True, **weights)

        assert torch.autograd.gradcheck(function, (x, y, theta))


@pytest.mark.parametrize("backend", ["numpy", "autograd"])
@pytest.mark.parametrize("other", [5, 4])
def test_second_derivatives(backend, other):
    x, y = clouds(1, 5, 2, dtype=torch.float64), clouds(1, other, 2, seed=1, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, directions(3, 2, dtype=torch.float64))]

    def function(x, y, theta):
        return sliced_wasserstein(x, y, projections=theta, p=3, backend=backend)

    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("shape", ["equal", "unequal", "weighted"])
def test_chunks_and_backends_change_nothing(backend, shape):
    """Against plain autograd, for chunks of directions and of clouds, in value and all three gradients."""
    other = 150 if shape == "unequal" else 100
    weights = {"x_weights": clouds(5, 100, seed=5).abs()} if shape == "weighted" else {}
    results = []
    for options in ({"backend": "autograd"}, *({"backend": backend, "chunk_size": size} for size in (1, 7, None))):
        inputs = [clouds(5, 100, 3), clouds(5, other, 3, seed=1), directions(20, 3)]
        for tensor in inputs:
            tensor.requires_grad_()
        value = sliced_wasserstein(*inputs[:2], projections=inputs[2], **weights, **options)
        results.append([value, *torch.autograd.grad(value.square().sum(), inputs)])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_clouds_are_chunked_too(monkeypatch):
    from trimtab.geometry import sliced_cost

    x, y, theta = clouds(7, 64, 3), clouds(7, 64, 3, seed=1), directions(9, 3)
    expected = sliced_wasserstein(x, y, projections=theta)
    monkeypatch.setattr(sliced_cost, "_CPU_ELEMENTS", 64 * 9 * 2)
    ranges = list(sliced_cost.chunks(7, 9, 64, x.device, None))
    assert [cloud for cloud, _ in ranges] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    torch.testing.assert_close(sliced_wasserstein(x, y, projections=theta), expected)


def test_a_batch_gives_what_its_items_give():
    x, y = clouds(3, 50, 3), clouds(3, 60, 3, seed=1)
    batch = sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(3))
    for i in range(3):
        single = sliced_wasserstein(x[i], y[i], generator=torch.Generator().manual_seed(3))
        assert single.ndim == 0
        torch.testing.assert_close(single, batch[i])
    torch.testing.assert_close(
        sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(3), reduction="mean"), batch.mean()
    )


@pytest.mark.parametrize("kind", ["iid", "orthogonal", "quasi"])
def test_a_shift(kind):
    """SW_2^2 = |t|^2 / d on average, (theta . t)^2 exactly in each slice."""
    x, t = clouds(64, 3), torch.tensor([0.6, -1.0, 1.6])
    generator = torch.Generator().manual_seed(0)
    value = sliced_wasserstein(x, x + t, num_projections=20_000, directions=kind, generator=generator)
    assert value.item() == pytest.approx(t.square().sum().item() / 3, rel=0.03)
    theta = directions(30, 3)
    slices = sliced_wasserstein(x, x + t, projections=theta, reduction="slices")
    torch.testing.assert_close(slices, (theta @ t).square(), rtol=1e-5, atol=1e-6)


def test_a_scaling():
    """Each slice of Y = s X is (s - 1)^2 theta' S theta with S = X'X / N."""
    x, theta = clouds(200, 4, dtype=torch.float64), directions(30, 4, dtype=torch.float64)
    moment = x.T @ x / 200
    expected = 0.49 * torch.einsum("li,ij,lj->l", theta, moment, theta)
    torch.testing.assert_close(sliced_wasserstein(x, 1.7 * x, projections=theta, reduction="slices"), expected)
    torch.testing.assert_close(sliced_wasserstein(x, 1.7 * x, projections=theta), expected.mean())


@pytest.mark.parametrize("weighted", [False, True])
def test_slices_have_a_gradient_and_are_the_same_without(weighted):
    x, y, theta = clouds(2, 20, 3).requires_grad_(), clouds(2, 15, 3, seed=1), directions(6, 3)
    weights = {"x_weights": clouds(2, 20, seed=5).abs()} if weighted else {}
    slices = sliced_wasserstein(x, y, projections=theta, reduction="slices", **weights)
    bare = sliced_wasserstein(x.detach(), y, projections=theta, reduction="slices", chunk_size=4, **weights)
    torch.testing.assert_close(slices.detach(), bare)
    mean = sliced_wasserstein(x, y, projections=theta, **weights)
    torch.testing.assert_close(slices.mean(1), mean)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (slices.mean(1), mean)]
    torch.testing.assert_close(*gradients)


def test_root_is_the_distance_with_gradient_zero_where_it_is_zero():
    x = clouds(2, 30, 3).requires_grad_()
    same = x.detach().clone().requires_grad_()
    for p in (1, 2, 3):
        value = sliced_wasserstein(x, same, p=p, root=True)
        for gradient in torch.autograd.grad(value.sum(), (x, same)):
            assert torch.equal(gradient, torch.zeros_like(gradient))
        assert torch.equal(value, torch.zeros(2))
    x, y, theta = clouds(40, 3), clouds(40, 3, seed=1), directions(10, 3)
    expected = ot.sliced_wasserstein_distance(x, y, projections=theta.T)
    torch.testing.assert_close(sliced_wasserstein(x, y, projections=theta, root=True), expected)


def test_invariances():
    x, y, theta = clouds(40, 3, dtype=torch.float64), clouds(40, 3, seed=1, dtype=torch.float64), directions(200, 3)
    value = sliced_wasserstein(x, y, projections=theta)
    shuffled = x[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(sliced_wasserstein(shuffled, y, projections=theta), value)
    torch.testing.assert_close(sliced_wasserstein(y, x, projections=theta), value)
    torch.testing.assert_close(sliced_wasserstein(x + 3, y + 3, projections=theta), value)
    torch.testing.assert_close(sliced_wasserstein(2 * x, 2 * y, projections=theta), 4 * value)
    turn = torch.linalg.qr(clouds(3, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(sliced_wasserstein(x @ turn.T, y @ turn.T, projections=theta @ turn.T.float()), value)


def test_repeated_points_equal_weights():
    """A cloud with points given twice is the cloud with doubled weights."""
    x, y, theta = clouds(10, 3), clouds(14, 3, seed=1), directions(20, 3)
    twice = torch.cat([x, x[:4]])
    weights = torch.ones(10)
    weights[:4] = 2
    torch.testing.assert_close(
        sliced_wasserstein(x, y, projections=theta, x_weights=weights), sliced_wasserstein(twice, y, projections=theta)
    )


def test_masked_points_may_hold_anything():
    x, y, theta = clouds(2, 10, 3), clouds(2, 10, 3, seed=1), directions(20, 3)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 6:] = False
    padded = x.clone()
    padded[0, 6:] = torch.nan
    padded.requires_grad_()
    value = sliced_wasserstein(padded, y, projections=theta, x_weights=mask)
    torch.testing.assert_close(value[0], sliced_wasserstein(x[0, :6], y[0], projections=theta))
    torch.testing.assert_close(value[1], sliced_wasserstein(x[1], y[1], projections=theta))
    (gradient,) = torch.autograd.grad(value.sum(), padded)
    assert torch.equal(gradient[0, 6:], torch.zeros(4, 3)) and gradient[0, :6].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_follow_the_clouds(dtype):
    x, y, theta = clouds(2, 60, 3).to(dtype).requires_grad_(), clouds(2, 60, 3, seed=1).to(dtype), directions(20, 3)
    value = sliced_wasserstein(x, y, projections=theta)
    assert value.dtype is dtype
    exact = sliced_wasserstein(x.detach().double(), y.double(), projections=theta)
    torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    value.sum().backward()
    assert x.grad.dtype is dtype and x.grad.isfinite().all()


def test_autocast_does_not_reach_the_projections():
    x, y, theta = clouds(2, 60, 3), clouds(2, 60, 3, seed=1), directions(20, 3)
    expected = sliced_wasserstein(x, y, projections=theta)
    with torch.autocast("cpu", torch.bfloat16):
        for options in ({}, {"backend": "autograd"}):
            torch.testing.assert_close(sliced_wasserstein(x, y, projections=theta, **options), expected)


def test_a_fixed_target_equals_the_cloud():
    x, y = clouds(3, 50, 3), clouds(40, 3, seed=1)
    target = SlicedTarget(y, num_projections=64, generator=torch.Generator().manual_seed(0))
    plain, cached = (x.clone().requires_grad_() for _ in range(2))
    expected = sliced_wasserstein(plain, y.expand(3, -1, -1), projections=target.projections)
    value = sliced_wasserstein(cached, target)
    torch.testing.assert_close(value, expected)
    (mine,), (reference) = torch.autograd.grad(value.sum(), cached), torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(mine, reference[0])
    torch.testing.assert_close(sliced_wasserstein(x, target, backend="autograd"), expected)
    assert sliced_wasserstein(x[0], target).ndim == 0
    some = sliced_wasserstein(x, target, num_projections=10, reduction="slices")
    assert some.shape == (3, 10)
    every = sliced_wasserstein(x, target, reduction="slices")
    assert all((one - every[0]).abs().min() < 1e-5 for one in some[0])
    each = SlicedTarget(clouds(3, 40, 3, seed=2), num_projections=16)
    expected = sliced_wasserstein(x, clouds(3, 40, 3, seed=2), projections=each.projections)
    torch.testing.assert_close(sliced_wasserstein(x, each), expected)


@pytest.mark.parametrize(("count", "m"), [(4, 30), (4, 20), (3, 30)])
def test_pairwise_equals_pair_by_pair(count, m):
    x, y, theta = clouds(3, 30, 3), clouds(count, m, 3, seed=1), directions(20, 3)
    table = sliced_wasserstein(x, y, projections=theta, pairwise=True)
    assert table.shape == (3, count)
    for i, j in itertools.product(range(3), range(count)):
        torch.testing.assert_close(table[i, j], sliced_wasserstein(x[i], y[j], projections=theta))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(sliced_wasserstein(x, y, projections=theta, pairwise=True)[:, 1].sum(), x)
    expected = sliced_wasserstein(x, y[1].expand(3, -1, -1), projections=theta).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-6)


def test_packed_keys_sort_exactly():
    """Ties, both zeros, subnormal and huge numbers: a permutation, and the bits of every value are kept."""
    from trimtab.geometry.sorting import sort_rows, sort_rows_with_order

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 3000)).astype(np.float32)
    rows[1] = np.round(rows[1], 1)
    rows[2, ::2] = 0.0
    rows[2, 1::3] = -0.0
    rows[3] *= np.float32(1e-39)
    rows[4] *= np.float32(1e38) / np.abs(rows[4]).max()
    rows[5] = 3.0
    for dtype in (np.float32, np.float64):
        original = torch.from_numpy(rows.astype(dtype))
        values, order = sort_rows_with_order(original.clone(), "numpy")
        expected = original.sort(dim=-1).values
        assert torch.equal(values, expected)
        assert torch.equal(order.sort(dim=-1).values, torch.arange(3000).expand(6, -1))
        assert torch.equal(original.gather(-1, order), values)
        assert torch.equal(sort_rows(original.clone(), "numpy"), expected)


def test_wasserstein_1d_broadcasts():
    u, v = clouds(4, 20), clouds(20, seed=1)
    for weights in ((None, None), (torch.full((20,), 0.05), None)):
        value = wasserstein_1d(u, v, *weights, p=1)
        for row, expected in zip(u, value, strict=True):
            assert float(ot.wasserstein_1d(row.numpy(), v.numpy(), p=1)) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("kind", ["iid", "orthogonal", "quasi"])
def test_directions_are_uniform_unit_vectors(kind, dim):
    theta = sample_directions(4000, dim, kind=kind, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(theta.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    moment = theta.T @ theta / 4000  # E theta theta' = I / d
    assert (moment - torch.eye(dim, dtype=torch.float64) / dim).abs().max() < 0.02
    fourth = theta.pow(4).mean()  # E theta_i^4 = 3 / (d (d + 2))
    assert fourth.item() == pytest.approx(3 / (dim * (dim + 2)), rel=0.05)


def test_orthogonal_and_quasi_directions_vary_less():
    x, y = clouds(100, 3), clouds(100, 3, seed=1) * torch.tensor([1.0, 2.0, 0.5]) + 0.3
    spread = {}
    for kind in ("iid", "orthogonal", "quasi"):
        generator = torch.Generator().manual_seed(0)
        options = {"num_projections": 30, "directions": kind, "generator": generator}
        spread[kind] = torch.stack([sliced_wasserstein(x, y, **options) for _ in range(60)]).std().item()
    assert spread["quasi"] < 0.5 * spread["orthogonal"] < 0.5 * spread["iid"]
