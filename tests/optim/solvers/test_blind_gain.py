"""Blind gain calibration: exact recovery, its sample complexity, noise, and what it refuses."""

import math

import cvxpy as cp
import pytest
import torch

from trimtab.optim.solvers import calibrate_gains, gain_step, project_gains


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sensing(n: int = 32, m: int = 32, p: int = 8, rho: float = 0.5, seed: int = 0):
    """Gaussian sensing matrices, a signal of length 1, gains within rho of 1 and of mean 1, and measurements."""
    source = generator(seed)
    A = torch.randn(p, m, n, generator=source, dtype=torch.float64)
    x = torch.randn(n, generator=source, dtype=torch.float64)
    x = x / x.norm()
    g = project_gains(1 + rho * (2 * torch.rand(m, generator=source, dtype=torch.float64) - 1), rho)
    return A, x, g, g * (A @ x)


def operators(A):
    return lambda v: A @ v, lambda r: torch.einsum("lij,li->j", A, r)


def errors(found, x, g) -> float:
    return max(float((found.signal - x).norm() / x.norm()), float((found.gains - g).norm() / g.norm()))


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_recovery_is_exact_with_enough_measurements(rho):
    for seed in range(4):
        A, x, g, y = sensing(rho=rho, seed=seed)
        found = calibrate_gains(y, *operators(A), tolerance=1e-14, max_iterations=600)
        assert found.converged and errors(found, x, g) < 1e-6 and found.num_iterations < 600
        uncalibrated = torch.linalg.lstsq(A.flatten(0, 1), y.flatten()).solution
        assert (uncalibrated - x).norm() > 0.03


def test_too_few_measurements_fail():
    """mp of n + m unknowns is not enough for this algorithm; four times as many are."""
    failures = 0
    for seed in range(4):
        A, x, g, y = sensing(p=2, seed=seed)
        failures += errors(calibrate_gains(y, *operators(A), max_iterations=200), x, g) > 1e-3
    assert failures >= 3


def test_subspaces_allow_a_single_snapshot():
    for seed in range(3):
        source = generator(10 + seed)
        Z = torch.randn(64, 8, generator=source, dtype=torch.float64)
        B = torch.eye(4, dtype=torch.float64).repeat_interleave(16, 0)
        A = torch.randn(1, 64, 64, generator=source, dtype=torch.float64)
        x = Z @ torch.randn(8, generator=source, dtype=torch.float64)
        g = project_gains(B @ torch.tensor([0.7, 1.2, 1.3, 0.8], dtype=torch.float64), 0.5)
        y = g * (A @ x)
        found = calibrate_gains(y, *operators(A), signal_basis=Z, gain_basis=B, tolerance=1e-15)
        assert errors(found, x, g) < 1e-6
        with pytest.raises(ValueError, match="64 measurements of 128 unknowns"):
            calibrate_gains(y, *operators(A))


def test_scale_goes_to_the_signal():
    A, _, _, y = sensing()
    one, five = (calibrate_gains(c * y, *operators(A), max_iterations=80) for c in (1, 5))
    assert torch.allclose(five.signal, 5 * one.signal, atol=1e-10) and torch.allclose(five.gains, one.gains, atol=1e-10)


def test_noise_costs_little_more_than_with_known_gains():
    for sigma in (1e-3, 1e-2, 1e-1):
        ratios = []
        for seed in range(3):
            A, x, g, y = sensing(seed=seed)
            y = y + sigma * torch.randn(y.shape, generator=generator(50 + seed), dtype=torch.float64)
            found = calibrate_gains(y, *operators(A), max_iterations=200)
            known = torch.linalg.lstsq((g[:, None] * A).flatten(0, 1), y.flatten()).solution
            ratios.append(float((found.signal - x).norm() / (known - x).norm()))
        assert sum(ratios) / 3 < 1.15
        assert sum(ratios) / 3 > 0.9


def test_gradient_steps_fall_and_fixed_steps_agree():
    A, x, g, y = sensing()
    found = calibrate_gains(y, *operators(A), step=0.3, max_iterations=900, tolerance=1e-13)
    assert errors(found, x, g) < 1e-5
    losses = found.history
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(losses, losses[1:], strict=False))


def test_projection_is_the_quadratic_programs():
    for seed, rho in ((0, 0.3), (1, 0.9), (2, 1.0)):
        w = 1 + torch.randn(10, generator=generator(seed), dtype=torch.float64)
        v = cp.Variable(10)
        cp.Problem(cp.Minimize(cp.sum_squares(v - w.numpy())), [cp.sum(v) == 10, cp.abs(v - 1) <= rho]).solve(
            solver="CLARABEL"
        )
        ours = project_gains(w, rho)
        assert ours.sum().item() == pytest.approx(10, abs=1e-10) and (ours - 1).abs().max() <= rho + 1e-12
        assert torch.allclose(ours, torch.from_numpy(v.value), atol=1e-5)


def test_gains_of_a_known_signal_are_exact():
    A, x, g, y = sensing()
    assert torch.allclose(gain_step(y, A @ x), g, atol=1e-10)
    assert torch.allclose(gain_step(3 * y, A @ x), g, atol=1e-10)


@pytest.mark.parametrize("kind", ["row of zeros", "gain of zero"])
def test_a_dead_sensor_is_marked_and_left_out(kind):
    A, x, g, y = sensing()
    y[:, 3] = 0
    if kind == "row of zeros":
        A[:, 3] = 0
    found = calibrate_gains(y, *operators(A), tolerance=1e-14)
    assert found.dead.nonzero().tolist() == [[3]] and found.gains[3] == 1
    live = ~found.dead
    mean = g[live].mean()
    assert torch.allclose(found.gains[live], g[live] / mean, atol=1e-5)
    assert torch.allclose(found.signal, x * mean, atol=1e-5)


def test_pictures_keep_their_shape():
    source = generator()
    patterns = torch.randint(0, 2, (6, 64, 8, 8), generator=source).double() * 2 - 1
    x = torch.rand(8, 8, generator=source, dtype=torch.float64)
    g = project_gains(1 + 0.5 * (2 * torch.rand(64, generator=source, dtype=torch.float64) - 1), 0.5)
    y = g * torch.einsum("lmij,ij->lm", patterns, x)
    found = calibrate_gains(
        y,
        lambda v: torch.einsum("lmij,ij->lm", patterns, v),
        lambda r: torch.einsum("lmij,lm->ij", patterns, r),
        tolerance=1e-13,
    )
    assert found.signal.shape == (8, 8) and errors(found, x, g) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.ones(4)}, "`y` is torch.float32"),
        ({"y": torch.zeros(8, 32).double()}, "`y` is 0 everywhere"),
        ({"y": torch.full((8, 32), math.nan).double()}, "`y` has values that are not finite"),
        ({"rho": 0.0}, "`rho` is 0.0"),
        ({"rho": 1.5}, "`rho` is 1.5"),
        ({"step": -1.0}, "`step` is -1.0"),
        ({"adjoint": lambda r: torch.ones(32).double()}, "`adjoint` is not that of `forward`"),
        ({"forward": lambda v: v[None]}, "`forward` gives shape"),
        ({"signal_basis": torch.ones(5, 2).double()}, "`signal_basis` has shape"),
        ({"signal_basis": torch.ones(32, 2).double()}, "columns that depend on each other"),
        ({"gain_basis": torch.eye(32).double()[:, :2]}, "no combination that is 1 everywhere"),
    ],
)
def test_bad_input_is_named(changes, message):
    A, _, _, y = sensing()
    forward, adjoint = operators(A)
    arguments = {"y": y, "forward": forward, "adjoint": adjoint, **changes}
    with pytest.raises(ValueError, match=message):
        calibrate_gains(arguments.pop("y"), arguments.pop("forward"), arguments.pop("adjoint"), **arguments)
