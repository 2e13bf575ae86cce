"""Conjugate directions, their proposers, and Poisson's equation, against scipy, numpy and closed forms."""

import math
import time

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg, spsolve

from trimtab.optim.solvers import (
    GridPoisson,
    Multigrid,
    block_deflation,
    conjugate_directions,
    incomplete_cholesky,
    sparse_matvec,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(n: int = 200, condition: float = 1e3):
    """A symmetric positive definite matrix with a known spectrum, and a right-hand side."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator(), dtype=torch.float64))
    A = (q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T
    return (A + A.T) / 2, torch.randn(n, generator=generator(1), dtype=torch.float64)


def disc(size: int = 40) -> torch.Tensor:
    """A disc with a hole, cut off by the picture's edge on one side."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    far = (row - size / 2) ** 2 + (column - size / 3) ** 2
    return (far < (size * 0.42) ** 2) & (far > (size * 0.08) ** 2)


def test_without_a_proposer_it_is_scipys_conjugate_gradients():
    A, b = spd()
    theirs, ours = [], []
    cg(A.numpy(), b.numpy(), rtol=0, maxiter=30, callback=lambda x: theirs.append(x.copy()))
    conjugate_directions(
        lambda x: A @ x, b, tolerance=0, max_iterations=30, callback=lambda _k, x: ours.append(x.numpy().copy())
    )
    assert len(ours) == 30
    for a, c in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - c) <= 1e-8 * np.linalg.norm(c)


@pytest.mark.parametrize("factor", [3.7, -1.0])
def test_the_exact_inverse_takes_one_step(factor):
    A, b = spd()
    inverse = torch.linalg.inv(A)
    result = conjugate_directions(lambda x: A @ x, b, propose=lambda r: factor * (inverse @ r), tolerance=1e-10)
    assert result.iterations == 1 and result.converged


def bad_network(n: int):
    """A random network with biases: no inverse of anything."""
    first = torch.randn(64, n, generator=generator(2), dtype=torch.float64) / n**0.5
    last = torch.randn(n, 64, generator=generator(3), dtype=torch.float64)
    return lambda r: (last @ torch.tanh(first @ r.flatten() * 30 + 0.3)).reshape(r.shape) + 0.3 * r


def test_the_error_never_grows_whatever_is_proposed():
    A = GridPoisson(torch.ones(20, 20, dtype=torch.bool), dtype=torch.float64)
    b = torch.randn(20, 20, generator=generator(), dtype=torch.float64)
    exact = torch.from_numpy(spsolve(A.sparse(), b.numpy().ravel())).reshape(20, 20)
    energies = [float((exact * A(exact)).sum())]
    conjugate_directions(
        A,
        b,
        propose=bad_network(400),
        tolerance=0,
        max_iterations=100,
        callback=lambda _k, x: energies.append(float(((x - exact) * A(x - exact)).sum())),
    )
    assert all(later <= earlier + 1e-12 for earlier, later in zip(energies, energies[1:], strict=False))
    assert energies[-1] < 0.9 * energies[0]


@pytest.mark.parametrize("keep", [0, 2])
def test_directions_are_orthogonal_to_the_kept_ones(keep):
    A, b = spd(60, 100)
    points = [torch.zeros_like(b)]
    conjugate_directions(
        lambda x: A @ x,
        b,
        propose=bad_network(60),
        keep=keep,
        tolerance=0,
        max_iterations=12,
        callback=lambda _k, x: points.append(x.clone()),
    )
    d = [later - earlier for earlier, later in zip(points, points[1:], strict=False)]
    cosines = [
        float((d[k] @ A @ d[k - j]).abs() / ((d[k] @ A @ d[k]) * (d[k - j] @ A @ d[k - j])).sqrt())
        for k in range(2, len(d))
        for j in (1, 2)
    ]
    assert max(cosines) < 1e-7 if keep == 2 else max(cosines) > 1e-2


def test_deflation_removes_the_small_eigenvalues():
    A = torch.diag(torch.cat([torch.full((5,), 1e-5), torch.linspace(1, 3, 95)]).double())
    b = torch.randn(100, generator=generator(), dtype=torch.float64)
    W = torch.eye(100, dtype=torch.float64)[:5]
    plain, deflated = (
        conjugate_directions(lambda x: A @ x, b, deflation=w, tolerance=1e-8, max_iterations=300) for w in (None, W)
    )
    assert deflated.converged and deflated.iterations < 0.8 * plain.iterations
    assert torch.allclose(deflated.x, b / A.diagonal(), rtol=1e-5)


def test_a_batch_is_its_items():
    A = GridPoisson(disc(), dtype=torch.float64)
    b = torch.randn(3, 40, 40, generator=generator(), dtype=torch.float64) * A.mask
    b[1] *= 1e-3
    together = conjugate_directions(A, b, batched=True, tolerance=1e-8)
    for row, item in zip(together.x, b, strict=True):
        assert torch.allclose(row, conjugate_directions(A, item, tolerance=1e-8).x, atol=1e-10)


@pytest.mark.parametrize("edges", ["zero", "free"])
def test_operator_and_its_sparse_matrix_agree(edges):
    mask = disc()
    coefficient = 0.5 + torch.rand(40, 40, generator=generator(), dtype=torch.float64)
    A = GridPoisson(mask, coefficient, edges=edges, dtype=torch.float64)
    x = torch.randn(40, 40, generator=generator(1), dtype=torch.float64) * mask
    matrix = A.sparse()
    assert np.allclose(A(x)[mask].numpy(), matrix @ x[mask].numpy()) and not A(x)[~mask].any() or edges == "zero"
    assert np.allclose(A(x)[mask].numpy(), matrix @ x[mask].numpy())
    assert abs(matrix - matrix.T).max() == 0 and np.linalg.eigvalsh(matrix.toarray())[0] > 0


@pytest.mark.parametrize("edges", ["zero", "free"])
def test_every_solver_gives_the_direct_solution(edges):
    mask = disc()
    A = GridPoisson(mask, edges=edges, dtype=torch.float64)
    b = torch.randn(40, 40, generator=generator(), dtype=torch.float64) * mask
    direct = spsolve(A.sparse(), b[mask].numpy())
    matrix = A.sparse()
    multigrid = conjugate_directions(A, b, propose=Multigrid(A), tolerance=1e-8)
    deflated = conjugate_directions(A, b, deflation=block_deflation(mask), tolerance=1e-8, max_iterations=400)
    flat = conjugate_directions(
        sparse_matvec(matrix), b[mask], propose=incomplete_cholesky(matrix), tolerance=1e-8, max_iterations=400
    )
    plain = conjugate_directions(A, b, tolerance=1e-8, max_iterations=400)
    for name, x in {"mg": multigrid.x[mask], "defl": deflated.x[mask], "ic": flat.x, "cg": plain.x[mask]}.items():
        assert np.abs(x.numpy() - direct).max() < 1e-5 * np.abs(direct).max(), name
    assert multigrid.iterations < flat.iterations < plain.iterations and deflated.iterations < plain.iterations


def test_incomplete_cholesky_keeps_the_matrixs_own_entries():
    """L L^T equals A wherever A is not 0: what defines IC(0)."""
    matrix = GridPoisson(disc(12), dtype=torch.float64).sparse()
    n = matrix.shape[0]
    solve = incomplete_cholesky(matrix)
    inverse = torch.stack([solve(row) for row in torch.eye(n, dtype=torch.float64)])
    product = torch.linalg.inv(inverse).numpy()
    there = matrix.toarray() != 0
    assert np.allclose(product[there], matrix.toarray()[there], atol=1e-8)
    assert np.abs(product[~there]).max() > 1e-3  # the fill-in that is left out


def test_multigrid_iterations_hardly_grow():
    counts = []
    for size in (32, 128, 256):
        A = GridPoisson(torch.ones(size, size, dtype=torch.bool))
        b = torch.randn(size, size, generator=generator())
        counts.append(conjugate_directions(A, b, propose=Multigrid(A), tolerance=1e-4).iterations)
    assert counts[-1] <= counts[0] + 6 and counts[-1] <= 20


def test_a_right_hand_side_of_zero_and_no_iterations():
    A, b = spd(10)
    result = conjugate_directions(lambda x: A @ x, torch.zeros(10, dtype=torch.float64))
    assert result.iterations == 0 and result.converged and not result.x.any()
    stopped = conjugate_directions(lambda x: A @ x, b, max_iterations=1, tolerance=1e-12)
    assert not stopped.converged and stopped.iterations == 1
    useless = conjugate_directions(lambda x: A @ x, b, propose=torch.zeros_like, tolerance=1e-8, max_iterations=50)
    assert useless.converged and useless.restarts == useless.iterations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matvec": lambda x: -x}, "not positive definite"),
        ({"matvec": lambda x: x * 0}, "not positive definite"),
        ({"matvec": lambda x: x[:2]}, r"`matvec` gives torch.float32 \(2,\)"),
        ({"b": torch.tensor([1.0, math.nan, 0.0])}, "`b` has entries that are not finite"),
        ({"x0": torch.zeros(2)}, "`x0` has shape"),
        ({"tolerance": -1.0}, "`tolerance` is -1.0"),
        ({"keep": -1}, "`keep` -1"),
        ({"propose": lambda r: r[:1]}, "`propose` gives shape"),
        ({"deflation": torch.ones(2, 3)}, "`deflation` has vectors that depend on each other"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"matvec": lambda x: 2 * x, "b": torch.tensor([1.0, 2.0, 3.0]), **changes}
    with pytest.raises(ValueError, match=message):
        conjugate_directions(arguments.pop("matvec"), arguments.pop("b"), **arguments)


def test_singular_grids_are_named():
    with pytest.raises(ValueError, match="`mask` is empty"):
        GridPoisson(torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no known pixel beside it"):
        GridPoisson(torch.ones(4, 4, dtype=torch.bool), edges="free")
    with pytest.raises(ValueError, match="`coefficient` takes"):
        GridPoisson(torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="the pivot of row 0"):
        incomplete_cholesky(-GridPoisson(torch.ones(3, 3, dtype=torch.bool)).sparse())


def test_blending_a_large_region_takes_less_than_a_second():
    A = GridPoisson(torch.ones(512, 512, dtype=torch.bool))
    b = torch.randn(512, 512, generator=generator())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a busy core count as computing
    try:
        start = time.thread_time()
        result = conjugate_directions(A, b, propose=Multigrid(A), tolerance=1e-4)
        assert result.converged and time.thread_time() - start < 1
    finally:
        torch.set_num_threads(threads)
