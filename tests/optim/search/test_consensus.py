"""Consensus-based optimization against closed forms, exact moments, and a landscape that traps gradient descent."""

import math

import pytest
import torch
from scipy.special import softmax

from trimtab.optim.search import (
    ConsensusBasedOptimization,
    ConsensusHopping,
    alpha_for_ess,
    consensus_based_optimization,
    consensus_hopping,
    consensus_point,
    contraction_factor,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def canyon(v):
    """The objective of the paper's figure: minimum 0 at the origin, a barrier on the canyon's floor."""
    x, y = v[..., 0], v[..., 1]
    c, b = y - ((x - 1) * (x - 4) ** 2 / 8 + 2), -x - 1.6 * y
    wall = 25 * (1 - torch.exp(-1.4 * c**2 * torch.exp(-0.002 * x**4))) + 0.4 * x**2 + 0.2 * y**2
    ripples = 1.1625 * ((1 - torch.cos(0.75 * math.pi * x)) + (1 - torch.cos(0.75 * math.pi * y)))
    barrier = 4 * torch.exp(1 - 2 * c**4) * ((1 - torch.exp(-9 * b**2)) * b.sign()).clamp_min(0)
    return wall + ripples + barrier


def quadratic(x):
    return x.square().flatten(1).sum(1)


def test_the_consensus_is_the_softmax_mean():
    x, energy = torch.randn(20, 3, 2, generator=seeded(0)).double(), torch.randn(20, generator=seeded(1)).double()
    point, weights = consensus_point(x, energy, 3.0)
    expected = softmax(-3.0 * energy.numpy())
    assert torch.allclose(weights, torch.from_numpy(expected), rtol=1e-12)
    assert torch.allclose(point, torch.einsum("n,nij->ij", torch.from_numpy(expected), x), rtol=1e-6)
    shifted, _ = consensus_point(x, energy + 1e6, 3.0)
    assert torch.allclose(shifted, point, rtol=0, atol=1e-6)


def test_infinite_alpha_takes_the_first_minimum_and_broken_points_weigh_nothing():
    x = torch.tensor([[math.nan], [1.0], [2.0], [3.0]])
    energy = torch.tensor([math.nan, 0.5, 0.5, math.inf])
    assert consensus_point(x, energy, math.inf)[0].item() == 1.0
    assert consensus_point(x, energy, 7.0)[0].item() == 1.5
    assert consensus_point(torch.tensor([[0.0], [2.0]]), torch.tensor([4.0, 4.0]), 1e30)[0].item() == 1.0
    with pytest.raises(ValueError, match="no finite value"):
        consensus_point(x, torch.full((4,), math.nan), 1.0)


def test_half_precision_points_keep_their_dtype_and_do_not_overflow():
    x, energy = torch.tensor([[0.0], [1.0]], dtype=torch.float16), torch.tensor([6e4, 6e4 - 32], dtype=torch.float16)
    point, _ = consensus_point(x, energy, 1e6)
    assert point.dtype == torch.float16 and point.item() == 1.0


@pytest.mark.parametrize("eta", [0.05, 0.2, 0.9])
def test_alpha_gives_the_effective_sample_size(eta):
    energy = torch.randn(100, generator=seeded(0), dtype=torch.float64)
    energy[3] = 1e7  # far above the others
    weights = softmax(-alpha_for_ess(energy, eta) * energy.numpy())
    assert 1 / (weights**2).sum() == pytest.approx(eta * 100, rel=1e-6)


def test_ties_at_the_minimum_share_the_weight():
    energy = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert consensus_point(torch.arange(4.0).unsqueeze(1), energy, alpha_for_ess(energy, 0.25))[0].item() == 1.5


def test_a_hop_is_a_proximal_step():
    """x_k = (I + alpha s^2 H)^-1 x_{k-1} for a quadratic; a wrong sign or a factor 2 misses by over 0.02."""
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    options = {"geometry": "euclidean", "width": 0.5, "width_end": 0.5, "alpha": 2.0, "elite": False}
    x0 = torch.tensor([0.3, -0.2], dtype=torch.float64)
    search = ConsensusHopping(x0, num_particles=200_000, generator=seeded(0), **options)
    search.tell(0.5 * torch.einsum("ni,ij,nj->n", x := search.ask(), H, x))
    expected = torch.linalg.solve(torch.eye(2, dtype=torch.float64) + 2.0 * 0.25 * H, x0)
    assert torch.allclose(expected, torch.tensor([0.17021, -0.16170], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(search.consensus, expected, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    "noise, dim, ratio", [("anisotropic", 50, 0.859), ("isotropic", 2, 0.908), ("isotropic", 50, 3.26)]
)
def test_second_moments_about_a_frozen_consensus(noise, dim, ratio, recwarn):
    """One particle with all the weight stays where the consensus is, at 0."""
    start = torch.randn(20_001, dim, generator=seeded(0))
    start[0] = 0.0
    options = {"dt": 0.1, "lam": 1.0, "sigma": 0.7, "noise": noise, "alpha": math.inf}
    search = ConsensusBasedOptimization(start, generator=seeded(1), **options)
    assert bool(recwarn) == (ratio > 1)
    energies = torch.ones(len(start))
    energies[0] = 0.0
    search.ask()
    search.tell(energies)
    assert (quadratic(search.particles).mean() / quadratic(start).mean()).item() == pytest.approx(ratio, rel=0.01)
    assert contraction_factor(dim, dt=0.1, lam=1.0, sigma=0.7, noise=noise) == pytest.approx(ratio, rel=2e-3)


@pytest.mark.filterwarnings("ignore:the swarm's spread grows")
def test_the_swarm_crosses_the_barrier_that_stops_gradient_descent():
    near = 0
    for seed in range(20):
        start = 8 + 0.5 * torch.randn(200, 2, generator=seeded(seed))
        options = {"dt": 0.01, "lam": 1.0, "sigma": 1.6, "alpha": 100.0, "noise": "isotropic", "kick_tol": None}
        found = consensus_based_optimization(canyon, start, steps=250, generator=seeded(100 + seed), **options)
        near += bool(found.consensus.norm() < 0.25)
    assert near >= 18
    v = torch.tensor([8.0, 8.0], dtype=torch.float64, requires_grad=True)
    for _ in range(10_000):
        (gradient,) = torch.autograd.grad(canyon(v), v)
        v = (v - 1e-3 * gradient).detach().requires_grad_()
        if gradient.norm() < 1e-6:  # there it stays
            break
    assert v.norm().item() == pytest.approx(3.4, abs=0.1)


def test_noise_without_a_gradient_is_optimized_on_its_sphere():
    """Piecewise constant, so no gradient anywhere; best of as many random points is over five times worse."""
    ours, random = [], []
    for seed in range(3):
        g = seeded(seed)
        W = torch.randn(128, 256, generator=g) / 16
        target = torch.tanh(1.5 * W @ torch.randn(256, generator=g))

        def energy(z, W=W, target=target):
            return ((8 * torch.tanh(z @ W.T)).round() / 8 - target).square().mean(1)

        result = consensus_hopping(energy, torch.randn(256, generator=g), generator=g)
        assert result.x.norm().item() / 16 == pytest.approx(1.0, abs=1e-4)
        assert result.num_evaluations == 1920
        assert energy(result.x.unsqueeze(0)).item() == pytest.approx(result.value, abs=1e-7)  # it was evaluated
        ours.append(result.value)
        random.append(energy(torch.randn(1920, 256, generator=g)).min().item())
    assert 5 * sum(ours) < sum(random)


def test_the_first_sample_is_the_start_itself():
    x0 = 1.1 * torch.randn(3, 4, generator=seeded(0))
    search = ConsensusHopping(x0)
    assert torch.equal(search.ask()[0], x0)
    worst = torch.full((32,), 5.0)
    worst[0] = 1.0
    search.tell(worst)
    assert torch.equal(search.best[0], x0) and search.best[1] == 1.0


@pytest.mark.parametrize("partial, reached", [(True, 0.6), (False, 1e-2)])
def test_particles_in_blocks_go_towards_the_minimum(partial, reached):
    start = torch.randn(60, 4, generator=seeded(0)) + 2
    options = {"particle_batch": 15, "partial": partial, "alpha": 30.0}
    found = consensus_based_optimization(quadratic, start, steps=400, **options)
    assert found.value < reached < 0.5 * quadratic(start).min() and found.num_evaluations == 6000


def test_a_partial_block_moves_its_own_particles_only():
    start = torch.randn(6, 2, generator=seeded(0))
    search = ConsensusBasedOptimization(start, particle_batch=2, alpha=1.0)
    block = search.ask()
    search.tell(quadratic(block))
    assert (search.particles != start).any(1).sum() == 2
    search = ConsensusBasedOptimization(start, particle_batch=2, partial=False, alpha=1.0)
    search.tell(quadratic(search.ask()))
    assert (search.particles != start).any(1).all()


def test_cooling_and_reduction_follow_their_schedules():
    start = torch.randn(100, 3, generator=seeded(0))
    options = {"sigma": 0.5, "alpha": 10.0, "epoch_length": 100, "cooling": True, "reduction": 0.2}
    search = ConsensusBasedOptimization(start, particle_batch=10, **options)
    for _ in range(300):
        search.tell(quadratic(search.ask()))
    assert search.alpha == 80.0
    assert search.sigma == pytest.approx(0.5 / math.log2(5))
    assert 50 <= len(search.particles) < 100 and len(search.particles) % 10 == 0


def test_a_swarm_at_rest_is_kicked():
    start = torch.zeros(10, 2)
    start[0, 0] = 1e-9
    search = ConsensusBasedOptimization(start, sigma=0.5)
    for _ in range(2):
        search.tell(quadratic(search.ask()))
    assert search.record["kicked"] and search.particles.std() > 0.05


def test_batches_of_the_objective_return_the_last_consensus():
    centres = iter(1 + 0.1 * torch.randn(400, 2, generator=seeded(0)))
    start = torch.randn(50, 2, generator=seeded(1))
    found = consensus_based_optimization(
        lambda x, centre: quadratic(x - centre), start, steps=200, batches=centres, kick_tol=None
    )
    assert torch.equal(found.x, found.consensus)
    assert found.x == pytest.approx(torch.ones(2), abs=0.15)


@pytest.mark.parametrize("make", [
    lambda: ConsensusBasedOptimization(torch.randn(20, 3, generator=seeded(0)), particle_batch=5, generator=seeded(2)),
    lambda: ConsensusHopping(torch.ones(3), num_particles=5, generator=seeded(2)),
    lambda: ConsensusHopping(
        torch.ones(3), num_particles=5, num_starts=3, generator=seeded(2),
        mask=lambda g: (torch.rand(3, generator=g) < 0.5).float(),
    ),
])  # fmt: skip
def test_a_run_resumes_from_its_state(make, tmp_path):
    whole, first, second = make(), make(), make()
    for _ in range(13):
        whole.tell(quadratic(whole.ask()))
    for _ in range(5):
        first.tell(quadratic(first.ask()))
    first.ask()  # interrupted between the two
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(second.ask(), second.ask())
    for _ in range(8):
        second.tell(quadratic(second.ask()))
    assert torch.equal(second.consensus, whole.consensus) and second.record == whole.record
    other = ConsensusHopping(torch.ones(4))
    with pytest.raises(ValueError, match="`state` has points"):
        other.load_state_dict(ConsensusHopping(torch.ones(5)).state_dict())


def test_starts_are_fresh_noise_and_the_best_of_them_is_gone_on_from():
    target = torch.randn(4096, generator=seeded(1))
    search = ConsensusHopping(
        torch.randn(4096, generator=seeded(0)), steps=5, num_particles=6, num_starts=2, width=0.6, generator=seeded(2)
    )
    told, asked = [], []
    for step in range(5):
        samples, before = search.ask(), search.consensus
        close = torch.cosine_similarity(samples, before[None])
        if step in (0, 1):
            assert close[step == 0 :].abs().max() < 0.06  # unrelated; the first of all is the start itself
        if step == 2:
            assert torch.allclose(close, torch.tensor(0.8), atol=0.03)  # sqrt(1 - 0.6^2)
        energies = (samples - target).square().mean(1)
        told.append(energies)
        asked.append(samples)
        search.tell(energies)
        if step == 1:
            best = int(torch.cat(told).argmin())
            assert torch.allclose(search.consensus, torch.cat(asked)[best], atol=1e-5)
    assert search.record["width"] == pytest.approx(0.05)


def test_a_masked_sample_leaves_the_rest_of_the_consensus():
    mask = torch.zeros(64)
    mask[10:30] = 1
    search = ConsensusHopping(
        torch.randn(64, generator=seeded(0)), num_particles=4, width=1.0, mask=lambda g: mask, elite=False
    )
    ratio = search.ask() / search.consensus
    kept = ratio[:, mask == 0]
    assert torch.allclose(kept, kept[:, :1].expand_as(kept), rtol=1e-4)  # but for the norm
    assert ratio[:, mask == 1].std() > 0.5


def test_a_callback_ends_the_run():
    result = consensus_hopping(quadratic, torch.ones(5), callback=lambda step, record: step == 3)
    assert result.stop_reason == "callback" and len(result.history) == 4


@pytest.mark.parametrize("change, message", [
    ({"dt": 0.0}, "`dt`"), ({"lam": -1.0}, "`lam`"), ({"dt": 0.5, "lam": 3.0}, "at most 1"),
    ({"noise": "white"}, "`noise`"), ({"alpha": 0.0}, "`alpha`"),
    ({"particle_batch": 7}, "divisor"), ({"cooling": True}, "`epoch_length`"),
    ({"x0": torch.ones(1, 3)}, "N >= 2"), ({"x0": torch.ones(5, 3)}, "not all equal"),
])  # fmt: skip
def test_bad_options_of_the_swarm_are_named(change, message):
    options = {"x0": torch.randn(20, 3, generator=seeded(0)), **change}
    with pytest.raises(ValueError, match=message):
        ConsensusBasedOptimization(**options)


def test_bad_options_of_hopping_are_named():
    with pytest.raises(ValueError, match="`geometry`"):
        ConsensusHopping(torch.ones(3), geometry="torus")
    with pytest.raises(ValueError, match="at most 1 on the sphere"):
        ConsensusHopping(torch.ones(3), width=1.5)
    with pytest.raises(ValueError, match="`num_starts`"):
        ConsensusHopping(torch.ones(3), num_starts=2, geometry="euclidean")
    with pytest.raises(ValueError, match="direction on the sphere"):
        ConsensusHopping(torch.zeros(3))
    with pytest.raises(ValueError, match="one energy a point"):
        consensus_hopping(lambda x: x, torch.ones(3))
    with pytest.raises(TypeError, match="`x0`"):
        ConsensusHopping(torch.ones(3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="call `ask` first"):
        ConsensusHopping(torch.ones(3)).tell(torch.ones(32))
