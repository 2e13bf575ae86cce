"""The network of deep conjugate directions, its loss and its data, against dense algebra; the trained one at work."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import spsolve

from trimtab.optim.solvers import (
    DeepDirections,
    DirectionNet,
    GridPoisson,
    conjugate_directions,
    direction_loss,
    ritz_pairs,
    ritz_right_hand_sides,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def domain(size: int = 12, dtype=torch.float64) -> GridPoisson:
    """A square without a corner and with a hole."""
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[: size // 3, : size // 2] = False
    mask[size // 2, size // 2] = False
    return GridPoisson(mask, dtype=dtype)


def dense(A: GridPoisson) -> torch.Tensor:
    return torch.from_numpy(A.sparse().toarray())


def test_all_ritz_pairs_are_the_eigenpairs():
    coefficient = 1 + torch.rand(12, 12, generator=generator(1), dtype=torch.float64)  # no eigenvalue twice
    A = GridPoisson(domain().mask.bool(), coefficient, dtype=torch.float64)
    inside = A.mask.bool()
    known = torch.linalg.eigvalsh(dense(A))
    values, vectors = ritz_pairs(A, torch.randn(12, 12, generator=generator(), dtype=torch.float64), len(known))
    assert torch.allclose(values, known, atol=1e-9)
    flat = vectors[:, inside]
    assert torch.allclose(flat @ flat.T, torch.eye(len(known), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(flat @ dense(A), values[:, None] * flat, atol=1e-7) and not vectors[:, ~inside].any()


def test_a_few_ritz_values_reach_both_ends_of_the_spectrum():
    A = GridPoisson(torch.ones(16, 16, dtype=torch.bool), dtype=torch.float64)
    values, vectors = ritz_pairs(A, torch.randn(16, 16, generator=generator(), dtype=torch.float64), 60)
    smallest = 8 * math.sin(math.pi / 34) ** 2
    assert len(values) == 60 and values[0] == pytest.approx(smallest, rel=0.05) and 7.5 < values[-1] < 8
    quotients = torch.stack([(v * A(v)).sum() for v in vectors])
    assert torch.allclose(quotients, values, atol=1e-9)


def test_right_hand_sides_are_smooth_more_than_not():
    vectors = torch.eye(40)
    b = ritz_right_hand_sides(vectors, 4000, generator=generator())
    assert torch.allclose(b.norm(dim=1), torch.ones(4000))
    sizes = b.square().mean(0)
    assert (sizes[:22] / sizes[22:].mean()).mean() == pytest.approx(81, rel=0.1)  # nine times, and 22 of 40
    assert sizes[22:].max() < sizes[:22].min() / 20


def test_the_loss_is_what_a_step_of_the_solver_leaves():
    A = domain(dtype=torch.float64)
    inside = A.mask.bool()
    b, f = (torch.randn(3, 12, 12, generator=generator(seed), dtype=torch.float64) * A.mask for seed in (0, 1))
    losses, left = direction_loss(A, b, f)
    for row in range(3):
        x, y, M = f[row][inside], b[row][inside], dense(A)
        rest = y - (x @ y) / (x @ M @ x) * (M @ x)
        assert torch.allclose(left[row][inside], rest) and losses[row] == pytest.approx(float(rest @ rest / (y @ y)))
        step = conjugate_directions(A, b[row], propose=lambda r, row=row: f[row], max_iterations=1, tolerance=0)
        assert step.residuals[1] ** 2 == pytest.approx(float(losses[row]))
    exact = torch.zeros_like(b)
    exact[:, inside] = torch.linalg.solve(dense(A), b[:, inside].T).T
    assert direction_loss(A, b, -3 * exact)[0].max() < 1e-20


def test_the_network_scales_and_keeps_to_the_mask():
    torch.manual_seed(0)
    net = DirectionNet(width=4, pairs=1)
    mask = torch.ones(1, 1, 13, 10)
    mask[..., :4, :5] = 0
    r = torch.randn(2, 1, 13, 10, generator=generator())
    f = net(r, mask)
    assert f.shape == r.shape and not (f * (1 - mask)).any() and f.any()
    assert torch.allclose(net(3 * r, mask), 3 * f, rtol=1e-4, atol=1e-6)
    assert torch.allclose(net(r + (1 - mask) * 5, mask), f)  # what is outside is not seen
    assert torch.allclose(net(r[1:], mask), f[1:], atol=1e-6)
    assert not torch.allclose(net(-r, mask), -f, atol=1e-3)  # it is no linear map


@pytest.mark.parametrize("kind", ["noise", "point", "smooth"])
def test_the_bundled_network_takes_few_iterations(kind):
    for size, most in ((64, 7), (130, 8)):
        A = GridPoisson(torch.ones(size, size, dtype=torch.bool))
        b = torch.randn(size, size, generator=generator())
        if kind == "point":
            b = torch.zeros(size, size)
            b[size // 3, size // 2] = 1
        elif kind == "smooth":
            b = torch.nn.functional.interpolate(b[None, None, :5, :5], size=(size, size), mode="bicubic")[0, 0]
        plain = conjugate_directions(A, b, max_iterations=1000)
        deep = conjugate_directions(A, b, propose=DeepDirections(A))
        assert deep.converged and deep.iterations <= most and plain.iterations >= 8 * deep.iterations
        assert deep.restarts == 0 and float((b - A(deep.x)).norm()) < 2e-4 * float(b.norm())


@pytest.mark.parametrize("varying", [False, True])
def test_the_bundled_network_on_masks_it_has_not_seen(varying):
    row, column = torch.meshgrid(*[torch.linspace(-1, 1, 96)] * 2, indexing="ij")
    star = (row.square() + column.square()).sqrt() < 0.6 + 0.3 * torch.cos(5 * torch.atan2(row, column))
    c = 10.0 ** torch.sin(3 * row + column) if varying else None  # 1 : 100
    A = GridPoisson(star, c)
    b = torch.randn(96, 96, generator=generator()) * A.mask
    plain = conjugate_directions(A, b, max_iterations=1000)
    deep = conjugate_directions(A, b, propose=DeepDirections(A), tolerance=1e-5, max_iterations=60)
    assert deep.converged and deep.iterations < plain.iterations / 3
    direct = spsolve(A.sparse(), b[star].double().numpy())
    assert np.abs(deep.x[star].numpy() - direct).max() < 1e-3 * np.abs(direct).max()


def test_a_batch_and_other_dtypes_are_taken():
    A = domain(20, torch.float64)
    propose = DeepDirections(A)
    r = torch.randn(2, 20, 20, generator=generator(), dtype=torch.float64) * A.mask
    q = propose(r)
    assert q.dtype == torch.float64 and q.shape == r.shape
    assert torch.allclose(q[1], propose(r[1]), rtol=1e-4, atol=1e-6)
    assert torch.equal(A.to("cpu")(r), A(r))


def test_bad_input_is_named():
    A = domain()
    with pytest.raises(ValueError, match="`width` is 0"):
        DirectionNet(width=0)
    with pytest.raises(ValueError, match="`gain` is -1"):
        DirectionNet(gain=-1.0)
    with pytest.raises(ValueError, match="`count` is 0"):
        ritz_pairs(A, torch.ones(12, 12), 0)
    with pytest.raises(ValueError, match="`start` is mapped to 0"):
        ritz_pairs(A, torch.zeros(12, 12), 3)
    with pytest.raises(ValueError, match="`low_weight` is 0"):
        ritz_right_hand_sides(torch.eye(3), 1, low_weight=0)
    with pytest.raises(ValueError, match="`extra` is 2"):
        ritz_right_hand_sides(torch.eye(3), 1, extra=2)
