"""Editing methods on flows whose velocity is known: between Gaussians, everything has a closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trimtab.pipelines.edit_methods import controlled_invert, controlled_sample, flowedit

SOURCE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
TARGET = torch.tensor([-0.5, 1.0, 0.7], dtype=torch.float64)
STD = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.35, 0.1, 0.0], dtype=torch.float64)

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def slope(sigma: torch.Tensor) -> torch.Tensor:
    return (sigma - (1 - sigma) * STD**2) / ((1 - sigma) ** 2 * STD**2 + sigma**2)


def towards(mean: torch.Tensor) -> Velocity:
    """The velocity of the flow from N(0, 1) to N(mean, STD^2)."""
    return lambda x, sigma: -mean + slope(sigma) * (x - (1 - sigma) * mean)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(count: int = 8) -> torch.Tensor:
    return SOURCE + STD * torch.randn(count, 3, generator=seeded(1), dtype=torch.float64)


def noise(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, generator=seeded(2), dtype=torch.float64)


def close(x: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


# ---- FlowEdit ----------------------------------------------------------------------------------------------


def test_flowedit_moves_one_gaussian_onto_another() -> None:
    """From full noise the path is straight, y + (1 - s) (m_target - m_source), so any number of steps is exact."""
    edited = flowedit(towards(SOURCE), towards(TARGET), SIGMAS, clean(), seeded())
    close(edited, clean() + TARGET - SOURCE)


def test_flowedit_from_part_of_the_noise() -> None:
    """Its move obeys a linear recursion in which the draws of the noise cancel."""
    sigmas = SIGMAS[2:]
    moved = torch.zeros(3, dtype=torch.float64)
    for s, following in zip(sigmas, sigmas[1:], strict=False):
        difference = TARGET - SOURCE
        moved = moved + (following - s) * (-difference + slope(s) * (moved - (1 - s) * difference))
    for n_avg in (1, 3):
        edited = flowedit(towards(SOURCE), towards(TARGET), sigmas, clean(), seeded(5), n_avg=n_avg)
        close(edited, clean() + moved)


def test_flowedit_of_equal_prompts_is_the_source() -> None:
    def bent(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x + sigma)

    close(flowedit(bent, bent, SIGMAS, clean(), seeded(), n_avg=2), clean(), 1e-14)


def test_flowedit_averages_over_draws() -> None:
    """The mean over n_avg draws: here the difference of velocities is the noised source itself."""
    sigmas = torch.tensor([0.5, 0.0], dtype=torch.float64)
    edited = flowedit(lambda x, s: torch.zeros_like(x), lambda x, s: x, sigmas, clean(), seeded(), n_avg=4)
    generator = seeded()
    draws = torch.stack([torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(4)])
    close(edited, clean() - 0.5 * (0.5 * clean() + 0.5 * draws.mean(0)))


def test_flowedit_ends_in_ordinary_sampling() -> None:
    """With n_min the number of steps it is SDEdit."""
    generator = seeded()
    x = SIGMAS[1] * torch.randn(8, 3, generator=generator, dtype=torch.float64) + (1 - SIGMAS[1]) * clean()
    for s, following in zip(SIGMAS[1:], SIGMAS[2:], strict=False):
        x = x + (following - s) * towards(TARGET)(x, s)
    close(flowedit(towards(SOURCE), towards(TARGET), SIGMAS[1:], clean(), seeded(), n_min=4), x)


@pytest.mark.parametrize("n_min", [0, 2, 4])
def test_flowedit_tells_where_straight_paths_end(n_min: int) -> None:
    """Of velocities that do not change along the path, each step already knows the end."""
    steps, seen = len(SIGMAS) - 1, []
    shift = torch.linspace(-1, 1, clean().numel()).reshape(clean().shape).to(clean())
    straight = lambda x, s: shift.clone()  # noqa: E731
    still = lambda x, s: torch.zeros_like(x)  # noqa: E731
    n_min = min(n_min, steps)
    edited = flowedit(still, straight, SIGMAS, clean(), seeded(), lambda *told: seen.append(told), n_min=n_min)
    assert [step for step, _ in seen] == list(range(steps))
    for step, estimate in seen:
        if step < steps - n_min:
            close(estimate, clean() - SIGMAS[0] * shift, 1e-12)
        else:
            close(estimate, edited, 1e-12)
    close(seen[-1][1], edited, 1e-14)


def test_flowedit_of_a_batch_is_that_of_its_rows() -> None:
    def bent(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x + sigma)

    def edit(y: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        return flowedit(bent, towards(TARGET), SIGMAS, y, [seeded(seed) for seed in seeds], n_min=2)

    both = edit(clean(2), [3, 4])
    close(both, torch.cat([edit(clean(2)[:1], [3]), edit(clean(2)[1:], [4])]))


@pytest.mark.parametrize("options, name", [({"n_avg": 0}, "n_avg"), ({"n_min": 6}, "n_min"), ({"n_min": -1}, "n_min")])
def test_flowedit_refuses(options: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is"):
        flowedit(towards(SOURCE), towards(TARGET), SIGMAS, clean(), seeded(), **options)


# ---- RF-Inversion ------------------------------------------------------------------------------------------


def test_control_at_one_is_the_straight_way_to_the_noise() -> None:
    for start in (0, 2):
        sigmas = SIGMAS[start:]
        found = controlled_invert(towards(SOURCE), sigmas, clean(), noise(), gamma=1.0)
        close(found, (1 - sigmas[0]) * clean() + sigmas[0] * noise())


def test_control_at_zero_is_euler() -> None:
    """Euler's steps of a flow between Gaussians scale the distance from its mean."""
    up, factor = SIGMAS.flip(0), torch.ones(3, dtype=torch.float64)
    for s, following in zip(up, up[1:], strict=False):
        factor = factor * (1 + (following - s) * slope(s))
    close(controlled_invert(towards(SOURCE), SIGMAS, clean(), noise(), gamma=0.0), factor * (clean() - SOURCE))
    down, factor = SIGMAS, torch.ones(3, dtype=torch.float64)
    for s, following in zip(down, down[1:], strict=False):
        factor = factor * (1 + (following - s) * slope(s))
    sampled = controlled_sample(towards(TARGET), SIGMAS, noise(), clean(), eta=0.0)
    close(sampled, TARGET + factor * noise())


def test_inversion_is_a_mixture_of_the_two_drifts() -> None:
    """dY/ds = gamma (y1 - Y) / (1 - s) without a flow: Y = y1 + (1 - s)^gamma (y - y1)."""
    sigmas = torch.linspace(0.9, 0, 2001, dtype=torch.float64)
    found = controlled_invert(lambda x, s: torch.zeros_like(x), sigmas, clean(), noise(), gamma=0.5)
    close(found, noise() + 0.1**0.5 * (clean() - noise()), 2e-3)


def test_full_pull_gives_the_source_back() -> None:
    close(controlled_sample(towards(TARGET), SIGMAS, noise(), clean(), eta=1.0, stop=1.0), clean())


def test_pull_in_the_first_share_of_steps_only() -> None:
    """Without a flow a pulled step takes x to y + (x - y) (1 - eta_i (s - s_next) / s)."""
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    sampled = controlled_sample(
        lambda x, s: torch.zeros_like(x), sigmas, noise(), clean(), eta=0.8, stop=0.5, decay=2.0
    )
    kept = (1 - 0.8 * 0.25) * (1 - 0.8 * 0.75**2 * 0.25 / 0.75)
    close(sampled, clean() + kept * (noise() - clean()))


@pytest.mark.parametrize(
    "name, value", [("eta", 1.5), ("eta", -0.1), ("stop", 2), ("decay", -1), ("eta", float("nan"))]
)
def test_sampling_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is"):
        controlled_sample(towards(TARGET), SIGMAS, noise(), clean(), **{name: value})


def test_inverting_refuses() -> None:
    with pytest.raises(ValueError, match="`gamma` is 1.1; takes a number in"):
        controlled_invert(towards(SOURCE), SIGMAS, clean(), noise(), gamma=1.1)
