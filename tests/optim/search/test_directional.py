"""Directional attacks and covering direct search: linear maps, the poll set's geometry, a jump, a shell."""

import math

import pytest
import torch

from trimtab.optim.search import DirectSearch, covering_direct_search, directional_attack, maximize_with_attacks
from trimtab.optim.search.polling import poll_direction


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shell(x):
    """The projection on sqrt(n) - 1 <= ||x|| <= sqrt(n) + 1."""
    root, length = math.sqrt(x.numel()), x.norm()
    return x * (length.clamp(root - 1, root + 1) / length)


def network(seed, n=32):
    """The sheet's benchmark: rounded features with a straight-through gradient, and its target."""
    g = seeded(seed)
    first, second = torch.randn(64, n, generator=g) / math.sqrt(n), torch.randn(10, 64, generator=g) / 8

    def phi(x):
        smooth = torch.tanh(2 * first @ x)
        return second @ (smooth + ((smooth * 8).round() / 8 - smooth).detach())

    target = phi(shell(torch.randn(n, generator=g)))
    return phi, (lambda y: -(y - target).square().sum()), shell(torch.randn(n, generator=g))


def test_an_attack_on_a_linear_map_is_the_sign_of_its_pullback():
    W, x = torch.randn(5, 8, generator=seeded(0)).double(), torch.randn(8, generator=seeded(1)).double()
    for u in (torch.randn(5, generator=seeded(2)).double(), torch.ones(5).double()):
        d = directional_attack(lambda x: W @ x, x, u, 0.1)
        assert torch.equal(d, 0.1 * torch.sign(W.T @ u))
        assert (u @ (W @ (x + d) - W @ x)).item() == pytest.approx(0.1 * (W.T @ u).abs().sum().item(), abs=1e-6) != 0
        ball = directional_attack(lambda x: W @ x, x, u, 0.1, norm="l2")
        assert torch.allclose(ball, 0.1 * W.T @ u / (W.T @ u).norm())
        assert torch.allclose(directional_attack(lambda x: W @ x, x, u, 0.1, steps=4), d)


def test_several_steps_stay_in_the_ball_and_climb_higher():
    phi, u = (lambda x: torch.stack([torch.sin(3 * x).sum(), (x[:-1] * x[1:]).sum()])), torch.tensor([1.0, 2.0])
    x = torch.randn(12, generator=seeded(0))
    for norm, measure in (("linf", lambda d: d.abs().max()), ("l2", torch.linalg.vector_norm)):
        one, ten = (directional_attack(phi, x, u, 0.8, norm=norm, steps=steps) for steps in (1, 10))
        assert measure(ten) <= 0.8 + 1e-6
        assert u @ phi(x + ten) > u @ phi(x + one)


def test_poll_directions_are_orthogonal_and_span_positively():
    n, v = 20, torch.randn(20, generator=seeded(0)).double()
    v /= v.norm()
    rows = torch.stack([poll_direction(v, i) for i in range(2 * n)])
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert torch.allclose(unit[:n] @ unit[:n].T, torch.eye(n).double(), atol=1e-6)
    assert torch.allclose(unit[n:], -unit[:n])
    g = torch.randn(1000, n, generator=seeded(1)).double()
    assert ((g / g.norm(dim=1, keepdim=True)) @ unit.T).amax(1).min() >= 1 / math.sqrt(n) - 1e-12
    # n + 1: some direction ascends for every g, and all of them together have full rank
    minimal = torch.cat([unit[:n], poll_direction(v, 2 * n).unsqueeze(0)])
    assert torch.linalg.matrix_rank(minimal) == n and ((g @ minimal.T).amax(1) > 0).all()


@pytest.mark.parametrize("covering", ["random", "farthest"])
def test_the_covering_step_crosses_a_jump_that_polling_does_not_see(covering):
    def jump(x):
        return -(x - 0.3).abs() if x > 0 else torch.tensor(-1.0)

    for seed in range(20):
        options = {"max_evals": 500, "retract": lambda x: x.clamp(-1, 1), "generator": seeded(seed)}
        start = torch.tensor([-0.8])
        search = DirectSearch(start, covering=covering, retract=options["retract"], generator=seeded(seed))
        search.r_dsm = 0.1
        for _ in range(500):
            x = search.ask()
            search.tell(float(jump(x)))
        assert abs(search.x.item() - 0.3) < 1e-3
    still = covering_direct_search(jump, start, r0=0.1, r_max=0.1, **options)  # no step reaches the jump
    assert still.x.item() == pytest.approx(-0.8) and len(still.trace) == 1


def test_every_accepted_point_lies_on_the_shell():
    phi, f, start = network(0)
    visited = []
    maximize_with_attacks(
        phi, f, start, retract=shell, max_evals=400, generator=seeded(0), callback=lambda s: visited.append(s.x.norm()),
        constraints=lambda x, y: ((x.norm() - math.sqrt(32)).abs() - 1 - 1e-6).reshape(1),
    )  # fmt: skip
    assert max(abs(float(norm) - math.sqrt(32)) for norm in visited) <= 1 + 2e-6 and len(visited) == 400


def test_the_hybrid_beats_attacks_and_direct_search_alone():
    hybrid, attacks, direct, early = 0.0, 0.0, 0.0, 0.0
    for seed in range(2):
        phi, f, start = network(seed)
        options = {"retract": shell, "generator": seeded(seed)}
        found = maximize_with_attacks(phi, f, start, **options)
        early += max(value for evaluations, value, _ in found.trace if evaluations <= 100)
        hybrid += found.value
        attacks += maximize_with_attacks(phi, f, start, direct=False, **options).value
        direct += covering_direct_search(lambda x, phi=phi, f=f: f(phi(x)), start, max_evals=2000, **options).value
    assert hybrid > 0.5 * attacks and hybrid > 0.1 * direct and early > 1.5 * attacks
    assert attacks < -1e-3  # alone they do end somewhere else


@pytest.mark.parametrize("barrier", ["two-phase", "quadratic"])
def test_an_infeasible_start_becomes_feasible(barrier):
    options = {"barrier": barrier, "penalty": 100.0, "generator": seeded(0)}
    found = maximize_with_attacks(
        lambda x: x, lambda y: y.sum(), torch.full((3,), 5.0), max_evals=1500,
        constraints=lambda x, y: (y.square().sum() - 3).reshape(1), **options,
    )  # fmt: skip
    assert found.feasible and found.x.square().sum() <= 3 and found.value == pytest.approx(3.0, abs=0.02)
    with pytest.raises(ValueError, match="`x0` is infeasible"):
        covering_direct_search(lambda x: x.sum(), torch.ones(2), constraints=lambda x: x - 0.5)


def test_without_a_gradient_it_is_direct_search_with_a_warning():
    with pytest.warns(UserWarning, match="no gradient"):
        found = maximize_with_attacks(lambda x: x.detach().round(), lambda y: -y.abs().sum(), torch.full((2,), 3.3))
    assert found.num_gradients == 0 and found.value == 0.0


def test_values_that_are_not_finite_are_never_taken_and_stationary_points_cost_nothing():
    found = covering_direct_search(
        lambda x: torch.log(1 - x.square().sum()), torch.tensor([0.5, 0.5]), max_evals=300, generator=seeded(0)
    )
    assert found.value > -1e-3 and all(math.isfinite(value) for _, value, _ in found.trace)
    flat = maximize_with_attacks(lambda x: 0 * x, lambda y: y.sum(), torch.ones(4), direct=False)
    assert flat.num_evaluations == 1 and flat.stop_reason == "radius"


def test_a_run_resumes_from_its_state(tmp_path):
    def objective(x):
        return -float((x - 1).square().sum())

    def make():
        return DirectSearch(torch.zeros(2, 3), generator=seeded(4), covering="farthest")

    whole, first, second = make(), make(), make()
    for search, steps in ((whole, 60), (first, 23)):
        for _ in range(steps):
            search.tell(objective(search.ask()))
    first.ask()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(37):
        second.tell(objective(second.ask()))
    assert torch.equal(second.x, whole.x) and second.trace == whole.trace


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at most 5000"):
        DirectSearch(torch.ones(6000))
    with pytest.raises(ValueError, match="`r_dsm`"):
        DirectSearch(torch.ones(3), r_dsm=(2.0, 10.0))
    with pytest.raises(ValueError, match="single number"):
        covering_direct_search(lambda x: x, torch.ones(3))
    with pytest.raises(ValueError, match="`constraints` gives"):
        covering_direct_search(lambda x: x.sum(), torch.ones(3), constraints=lambda x: x.sum())
    with pytest.raises(ValueError, match="`barrier`"):
        DirectSearch(torch.ones(3), barrier="log")
    with pytest.raises(ValueError, match="takes that of phi"):
        directional_attack(lambda x: x, torch.ones(3), torch.ones(2), 0.1)
    with pytest.raises(RuntimeError, match="call `ask` first"):
        DirectSearch(torch.ones(3)).tell(0.0)
