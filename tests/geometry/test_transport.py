"""Chamfer, exact and entropic transport against dense tables, scipy and POT."""

import resource

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from trimtab.geometry import chamfer, chamfer_distance, earth_movers_distance, sinkhorn_divergence


def clouds(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_chamfer(x, y, squared=True):
    table = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    table = table.square() if squared else table
    return table.min(2).values.mean(1) + table.min(1).values.mean(1)


@pytest.mark.parametrize("dim", [1, 3, 12])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("tiled", [False, True])
def test_chamfer_equals_the_dense_form(monkeypatch, dim, squared, tiled):
    if tiled:
        monkeypatch.setattr(chamfer, "_TREE_DIMENSIONS", 0)
        monkeypatch.setattr(chamfer, "_TILE_ELEMENTS", 2 * 70 * 9)
    x, y = clouds(2, 50, dim).requires_grad_(), clouds(2, 70, dim, seed=1).requires_grad_()
    value, expected = chamfer_distance(x, y, squared=squared), dense_chamfer(x, y, squared)
    torch.testing.assert_close(value, expected)
    got = torch.autograd.grad(value.sum(), (x, y))
    for gradient, wanted in zip(got, torch.autograd.grad(expected.sum(), (x, y)), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("tiled", [False, True])
def test_chamfer_with_masks(monkeypatch, tiled):
    if tiled:
        monkeypatch.setattr(chamfer, "_TREE_DIMENSIONS", 0)
    x, y = clouds(2, 20, 3), clouds(2, 25, 3, seed=1)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 11:] = False
    value = chamfer_distance(x, y, x_weights=mask)
    torch.testing.assert_close(value[0], dense_chamfer(x[:1, :11], y[:1])[0])
    torch.testing.assert_close(value[1], dense_chamfer(x, y)[1])


def test_chamfer_holds_no_table():
    """At N = 30,000 the table would take 3.6 GB in float32."""
    x, y = clouds(30_000, 3, dtype=torch.float32), clouds(30_000, 3, seed=1, dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert chamfer_distance(x, y) > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("p", [1, 2, 3])
def test_exact_transport_equals_scipys_assignment(p):
    x, y = clouds(2, 40, 3), clouds(2, 40, 3, seed=1)
    value = earth_movers_distance(x, y, p=p)
    for i in range(2):
        table = torch.cdist(x[i], y[i]).pow(p).numpy()
        rows, columns = linear_sum_assignment(table)
        assert value[i].item() == pytest.approx(table[rows, columns].mean())
    torch.testing.assert_close(earth_movers_distance(x, y, p=p, root=True), value ** (1 / p))


def test_exact_transport_of_a_shift_and_with_weights():
    x, t = clouds(50, 3), torch.tensor([0.3, 0.4, 1.2], dtype=torch.float64)
    assert earth_movers_distance(x, x + t).item() == pytest.approx(1.3)
    assert earth_movers_distance(x, x + t, p=2).item() == pytest.approx(1.69)
    y, a, b = clouds(30, 3, seed=1), clouds(50, seed=2).abs(), clouds(30, seed=3).abs()
    expected = ot.emd2((a / a.sum()).numpy(), (b / b.sum()).numpy(), ot.dist(x.numpy(), y.numpy()))
    assert earth_movers_distance(x, y, p=2, x_weights=a, y_weights=b).item() == pytest.approx(expected)


def test_gradients_of_exact_transport():
    x, y = clouds(2, 6, 2).requires_grad_(), clouds(2, 5, 2, seed=1).requires_grad_()
    for p in (1, 2):
        assert torch.autograd.gradcheck(lambda x, y, p=p: earth_movers_distance(x, y, p=p), (x, y))


def test_sinkhorn_divergence():
    """|t|^2 of a shift at any regularization; exact W_2^2 as it falls; zero for equal clouds."""
    x, t = clouds(2, 30, 3), torch.tensor([0.3, 0.4, 1.2], dtype=torch.float64)
    for regularization in (1.0, 0.3):
        value = sinkhorn_divergence(x, x + t, regularization=regularization)
        np.testing.assert_allclose(value, 1.69, rtol=1e-3)
    x, y = x[:, :12], clouds(2, 12, 3, seed=1)
    close = sinkhorn_divergence(x, y, regularization=0.05)
    torch.testing.assert_close(close, earth_movers_distance(x, y, p=2), rtol=0.02, atol=0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_divergence(x, x.detach() + t, regularization=0.5).sum(), x)
    torch.testing.assert_close(gradient, (-2 * t / 12).expand_as(gradient), rtol=1e-2, atol=1e-4)
    wide = sinkhorn_divergence(clouds(1, 30, 8), clouds(1, 20, 8, seed=1), regularization=0.5)
    assert wide.item() > 0
