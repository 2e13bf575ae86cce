"""The fixed-point iteration against closed forms, theorems and scipy."""

import numpy as np
import pytest
import scipy.optimize
import torch

from trimtab.optim import estimate_step_size, fixed_point
from trimtab.optim.solvers.anderson import AndersonMixing

ROTATION = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)  # bound 2 * 0.8 / (0.8^2 + 0.6^2) = 1.6


def rotated(x: torch.Tensor) -> torch.Tensor:
    return x @ ROTATION.T.to(x.dtype)


def last(*args, **options):
    *_, state = fixed_point(*args, **options)
    return state


# ---- the paper's update ------------------------------------------------------------------------------------


def test_the_bound_is_sharp():
    """Below 1.6 the residual goes to nothing, above it the run is caught on its way to infinity."""
    x0, y = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    below = last(rotated, y, x0, step_size=1.568, max_iterations=2000)
    assert below.residual.item() < 1e-12
    with pytest.warns(UserWarning, match=r"row \[0\] is beyond 10 times its start at iteration \d+.*1\.63"):
        states = list(fixed_point(rotated, y, x0, step_size=1.632, max_iterations=2000))
    assert len(states) < 2000 and bool(states[-1].stopped.all())
    assert states[-1].residual <= states[0].residual
    assert torch.equal(states[-1].residual, states[-1].best_residual)
    torch.testing.assert_close(states[-1].value, rotated(states[-1].x))
    x = x0
    for _ in range(2000):
        x = x - 1.632 * (rotated(x) - y)
    assert (rotated(x) - y).norm() > 1e10  # what it was caught on its way to


MEAN = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
DEVIATION = torch.tensor([0.05, 0.3, 1.0, 2.0], dtype=torch.float64)
SLOPES = torch.tensor([0.0073879, 0.1851737, 0.8330240, 1.7463036], dtype=torch.float64)


def gaussian_sampler(x: torch.Tensor) -> torch.Tensor:
    """Euler's method for data N(MEAN, DEVIATION^2) on the linear path, ten steps with shift 3."""
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    x = x.double()
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
        velocity = -MEAN + (sigma - (1 - sigma) * DEVIATION**2) / variance * (x - (1 - sigma) * MEAN)
        x = x + (following - sigma) * velocity
    return x


def test_gaussian_flow_in_closed_form():
    zero, one = gaussian_sampler(torch.zeros(1, 4)), gaussian_sampler(torch.ones(1, 4))
    torch.testing.assert_close(zero[0], MEAN, rtol=0, atol=1e-6)
    torch.testing.assert_close((one - zero)[0], SLOPES, rtol=0, atol=1e-6)
    y, eta = torch.tensor([[1.1, -1.5, 0.2, 3.0]]).double(), 0.9
    x0 = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).double()
    slopes = (one - zero)[0]
    first = (gaussian_sampler(x0) - y)[0]
    for state in fixed_point(gaussian_sampler, y, x0, step_size=eta, max_iterations=12):
        expected = first * (1 - eta * slopes) ** state.iteration
        torch.testing.assert_close((state.value - y)[0], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(state.residual[0], expected.square().mean().sqrt(), rtol=0, atol=1e-10)


def test_the_bound_of_the_gaussian_flow():
    report = estimate_step_size(gaussian_sampler, torch.zeros(1, 4), quantile=0.0, local_points=40, global_points=10)
    assert report.negative_fraction == 0.0
    assert 2 / 1.7463036 - 1e-3 <= report.bound.item() <= 1.4
    widest = estimate_step_size(lambda x: gaussian_sampler(x.expand(-1, 4))[:, 3:], torch.zeros(1, 1).double())
    ratios = torch.cat([widest.local_ratios, widest.global_ratios])
    torch.testing.assert_close(ratios, torch.full_like(ratios, 1.14528), rtol=1e-5, atol=0)


def test_the_distance_to_the_solution_never_rises_below_the_bound():
    x0, y = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    solution = torch.linalg.solve(ROTATION, y[0].double())
    states = list(fixed_point(rotated, y, x0, step_size=1.5, max_iterations=30))
    distances = torch.stack([(state.x[0] - solution).norm() for state in states])
    residuals = torch.cat([state.residual for state in states])
    assert bool((distances.diff() <= 1e-6).all()) and bool((residuals.diff() <= 1e-6).all())
    beta = 0.8
    guaranteed = distances[0] / (1.5 * (2 * beta - 1.5) * len(states)) ** 0.5
    assert residuals.min() * 2**0.5 <= guaranteed


@pytest.mark.parametrize("acceleration", ["none", "anderson"])
def test_the_iterate_is_float32_whatever_the_dtype(acceleration):
    """An update of 2.5e-4 at 1.5 is below float16's spacing of 9.8e-4: rounded to it, nothing would ever move."""
    x0, y = torch.full((1, 4), 1.5, dtype=torch.float16), torch.full((1, 4), 1.4, dtype=torch.float16)
    seen = []

    def f(x):
        seen.append(x)
        return x.half() * 0 + 1.5  # a model of half precision: residual 0.1

    states = list(fixed_point(f, y, x0, step_size=0.0025, max_iterations=1, acceleration=acceleration))
    assert {x.dtype for x in seen} == {torch.float32}
    moved = (states[1].x - states[0].x).abs()
    torch.testing.assert_close(moved, torch.full((1, 4), 0.0025 * 0.1), rtol=1e-2, atol=0)
    assert bool((states[0].x.half() - (0.0025 * (1.5 - y)).half() == states[0].x.half()).all())  # the official rounding


# ---- rows, stops, errors -----------------------------------------------------------------------------------


def bent(x: torch.Tensor) -> torch.Tensor:
    return x + 0.4 * torch.sin(2 * x) + 0.2 * x.roll(1, 1)


@pytest.mark.parametrize("acceleration", ["none", "anderson"])
def test_a_batch_gives_what_its_rows_give(acceleration):
    generator = torch.Generator().manual_seed(0)
    x0, y = (torch.randn(3, 6, generator=generator) for _ in range(2))
    options = {"max_iterations": 12, "acceleration": acceleration}
    batch = last(bent, y, x0, step_size=torch.tensor([0.2, 0.5, 0.3]), **options)
    for row, eta in enumerate((0.2, 0.5, 0.3)):
        alone = last(bent, y[row : row + 1], x0[row : row + 1], step_size=eta, **options)
        torch.testing.assert_close(batch.x[row : row + 1], alone.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("acceleration", ["none", "anderson"])
def test_a_row_that_diverges_rests_at_its_best_and_the_others_go_on(acceleration):
    f = lambda x: torch.stack([x[0], -20 * x[1]])  # noqa: E731  no step is small enough for the second row
    with pytest.warns(UserWarning, match=r"row \[1\] is beyond 10 times"):
        states = list(fixed_point(f, torch.ones(2, 3), torch.zeros(2, 3), step_size=0.5, max_iterations=20))
    assert states[-1].iteration == 20
    assert states[-1].residual[0] < 1e-5 and states[-1].residual[1] == states[0].residual[1]
    assert torch.equal(states[-1].x[1], torch.zeros(3))
    assert states[-1].stopped.tolist() == [False, True]


def test_a_value_that_is_not_finite_ends_a_run_with_what_it_had():
    f = lambda x: torch.where(x > 0.5, torch.nan, x * 1.0)  # noqa: E731
    with pytest.warns(UserWarning, match="beyond 10 times its start"):
        states = list(fixed_point(f, torch.ones(1, 2), torch.zeros(1, 2), step_size=0.4, max_iterations=9))
    assert len(states) == 3 and bool(states[-1].x.isfinite().all())
    with pytest.raises(RuntimeError, match="not finite"):
        list(fixed_point(lambda x: x / 0, torch.ones(1, 2), torch.zeros(1, 2), step_size=0.1))


def test_a_row_within_the_tolerance_rests():
    f = lambda x: x * torch.tensor([[1.0], [0.1]])  # noqa: E731
    states = list(fixed_point(f, torch.ones(2, 3), torch.zeros(2, 3), step_size=0.5, max_iterations=40, tolerance=1e-3))
    first = next(state for state in states if state.stopped[0])
    assert first.iteration == 10  # 0.5^10 < 1e-3
    assert torch.equal(states[-1].x[0], first.x[0]) and not bool(states[-1].stopped[1])
    assert len(list(fixed_point(f, torch.zeros(2, 3), torch.zeros(2, 3), step_size=0.5, tolerance=0.0))) == 1


def test_nothing_is_computed_before_it_is_asked_for():
    calls = []
    f = lambda x: calls.append(1) or x  # noqa: E731
    states = fixed_point(f, torch.ones(1, 1), torch.zeros(1, 1), step_size=0.1, max_iterations=3)
    assert not calls
    next(states)
    assert len(calls) == 1
    assert [state.num_function_evaluations for state in states] == [2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "`step_size` is"),
        ({"step_size": float("nan")}, "`step_size` is"),
        ({"step_size": torch.ones(2)}, "`step_size` has shape"),
        ({"max_iterations": -1}, "`max_iterations` is -1"),
        ({"acceleration": "newton"}, "`acceleration` is 'newton'; takes 'none' or 'anderson'"),
        ({"memory": 0}, "`memory` is 0"),
        ({"regularization": -1.0}, "`regularization` is -1"),
        ({"step_limit": 0.0}, "`step_limit` is 0"),
        ({"tolerance": -1.0}, "`tolerance` is -1"),
        ({"x0": torch.zeros(1, 2)}, "`x0` has shape"),
        ({"f": lambda x: x[:, :1]}, "`f` gives shape"),
    ],
)
def test_refusals(options, message):
    arguments = {"f": bent, "y": torch.ones(1, 3), "x0": torch.zeros(1, 3), "step_size": 0.1} | options
    with pytest.raises(ValueError, match=message):
        list(fixed_point(arguments.pop("f"), arguments.pop("y"), arguments.pop("x0"), **arguments))
    with pytest.raises(TypeError, match="`max_iterations` is a float"):
        list(fixed_point(bent, torch.ones(1, 3), torch.zeros(1, 3), step_size=0.1, max_iterations=2.0))


# ---- Anderson mixing ---------------------------------------------------------------------------------------


def test_anderson_is_scipys():
    """The same iterates as scipy's implementation of the same formula, without regularization or safeguards."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(5, 5)) * 0.3 + np.eye(5)

    def g(x):
        return matrix @ x + 0.3 * np.sin(x) - 1.0

    theirs = []
    scipy.optimize.anderson(
        g, np.zeros(5), iter=8, alpha=-0.4, w0=0.0, M=3, line_search=None, callback=lambda x, f: theirs.append(x.copy())
    )
    mixing, x = AndersonMixing(3, 0.0, 1e9), torch.zeros(1, 5, dtype=torch.float64)
    for expected in theirs:
        x = x + mixing.step(x, -0.4 * torch.from_numpy(g(x[0].numpy()))[None])
        np.testing.assert_allclose(x[0].numpy(), expected, rtol=1e-6, atol=1e-8)


def test_anderson_solves_a_linear_problem_in_as_many_steps_as_it_has_dimensions():
    """With the whole history it is GMRES in other words (Walker and Ni 2011, theorem 2.2)."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(6, dtype=torch.float64) + 0.4 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    b, x = torch.randn(1, 6, generator=generator, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    mixing = AndersonMixing(10, 0.0, 1e9)
    krylov = torch.stack([torch.linalg.matrix_power(matrix, k) @ b[0] for k in range(6)], 1)
    for k in range(7):
        residual = (matrix @ x[0] - b[0]).norm()
        if k >= 2:  # the residual of k - 1 steps of GMRES bounds that of the next iterate up to ||I - eta A||
            best = torch.linalg.lstsq(matrix @ krylov[:, : k - 1], b[0, :, None])
            gmres = (matrix @ krylov[:, : k - 1] @ best.solution - b[0, :, None]).norm()
            factor = torch.linalg.matrix_norm(torch.eye(6, dtype=torch.float64) - 0.5 * matrix, 2)
            assert residual <= factor * gmres * (1 + 1e-6) + 1e-9
        x = x + mixing.step(x, -0.5 * (x @ matrix.T - b))
    assert (matrix @ x[0] - b[0]).norm() < 1e-8


def test_a_row_forgets_when_it_is_told_to():
    generator = torch.Generator().manual_seed(2)
    points = [torch.randn(2, 5, generator=generator) for _ in range(4)]
    steps = [torch.randn(2, 5, generator=generator) for _ in range(4)]
    forgetful, plain = AndersonMixing(3, 1e-2, 8.0), AndersonMixing(3, 1e-2, 8.0)
    for k, (x, step) in enumerate(zip(points, steps, strict=True)):
        forget = torch.tensor([k == 3, False])
        given, full = forgetful.step(x, step, forget=forget), plain.step(x, step)
    assert torch.equal(given[0], steps[3][0]) and torch.equal(given[1], full[1])
    assert not torch.equal(full[0], steps[3][0])


def test_a_step_is_never_longer_than_its_limit():
    generator = torch.Generator().manual_seed(3)
    mixing = AndersonMixing(2, 0.0, 1.5)
    for _ in range(5):
        x, step = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
        assert bool((mixing.step(x, step).norm(dim=1) <= 1.5 * step.norm(dim=1) * (1 + 1e-5)).all())


def test_the_safeguard_steps_back_from_where_the_residual_rose():
    """And takes the plain step from the best point, half of it where that was tried already."""
    generator = torch.Generator().manual_seed(4)
    noise = 0.3 * torch.randn(60, 1, 6, generator=generator)
    points, values = [], []

    def rough(x):
        points.append(x.clone())
        values.append(x + noise[len(points)])
        return values[-1]

    y, eta = torch.ones(1, 6), 0.5
    states = list(fixed_point(rough, y, torch.zeros(1, 6), step_size=eta, max_iterations=40, acceleration="anderson"))
    sizes = [(value - y).square().mean().sqrt().item() for value in values]
    in_a_row, damping, was_plain, most = 0, 1.0, True, 0
    for k, shown in enumerate(states[:-1]):
        best = min(range(k + 1), key=lambda j: sizes[j])
        assert shown.residual.item() == pytest.approx(sizes[best]) and torch.equal(shown.x, points[best])
        in_a_row = 0 if best == k else in_a_row + 1
        if in_a_row == 0:
            damping = min(1.0, 2 * damping)
        elif was_plain:
            damping /= 2
        if in_a_row:
            torch.testing.assert_close(points[k + 1], points[best] - eta * damping * (values[best] - y))
        was_plain = in_a_row > 0
        most = max(most, in_a_row)
    assert most > 2


# ---- the sheet's mixture -----------------------------------------------------------------------------------


class Mixture:
    """A flow to six Gaussians in eight dimensions, with its exact velocity."""

    def __init__(self, seed: int = 0, points: int = 128) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        which = torch.randint(6, (points,), generator=generator)
        noise = torch.randn(points, 8, generator=generator, dtype=torch.float64)
        self.y = self.means[which] + 0.4 * noise
        self.sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)

    def velocity(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        variance = (1 - sigma) ** 2 * 0.16 + sigma**2
        centred = x[:, None] - (1 - sigma) * self.means
        weights = torch.softmax(-centred.square().sum(-1) / (2 * variance), 1)
        slope = (sigma - (1 - sigma) * 0.16) / variance
        each = -self.means + slope * centred
        return (weights[..., None] * each).sum(1)

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        for sigma, following in zip(self.sigmas[:-1].tolist(), self.sigmas[1:].tolist(), strict=True):
            x = x + (following - sigma) * self.velocity(x, sigma)
        return x

    def invert(self, y: torch.Tensor) -> torch.Tensor:
        """Uni-Inv."""
        sigmas, x = self.sigmas.flip(0).tolist(), y.double()
        w = self.velocity(x, sigmas[0])
        for before, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            w = self.velocity(x + (after - before) * w, after)
            x = x + (after - before) * w
        return x


@pytest.fixture(scope="module")
def mixture():
    return Mixture()


def errors(mixture: Mixture, **options) -> list[float]:
    f, x0 = mixture.sample, mixture.invert(mixture.y)
    states = fixed_point(f, mixture.y, x0, **options)
    return [state.residual.square().mean().sqrt().item() for state in states]


def test_mixture_inversion(mixture):
    plain = errors(mixture, step_size=0.1, max_iterations=16)
    assert plain[16] <= 0.55 * plain[0] and plain[16] < plain[8] < plain[0]
    with pytest.warns(UserWarning, match="beyond 10 times its start"):  # the step size matters
        errors(mixture, step_size=1.0, max_iterations=16)


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.4])
def test_mixture_is_inverted_faster_with_anderson(mixture, eta):
    """At any of these steps, against the best of the paper's update, which one of them makes stall or diverge."""
    curves = [errors(mixture, step_size=other, max_iterations=16) for other in (0.05, 0.1, 0.2, 0.4)]
    plain = [min(column) for column in zip(*curves, strict=True)]
    faster = errors(mixture, step_size=eta, max_iterations=16, acceleration="anderson")
    assert faster[8] <= 0.5 * plain[8] and faster[16] <= 0.2 * plain[16]


def test_mixture_through_the_inverse_never_gets_worse(mixture):
    """Uni-Inv is no contraction's inverse here: without the safeguard the residual goes up and down."""
    there_and_back = lambda u: mixture.sample(mixture.invert(u))  # noqa: E731
    options = {"step_size": 1.0, "max_iterations": 8}
    plain, safe = (
        torch.stack(
            [
                s.residual.square().mean().sqrt()
                for s in fixed_point(there_and_back, mixture.y, mixture.y, **options, acceleration=a)
            ]
        )
        for a in ("none", "anderson")
    )
    assert bool((plain.diff() > 0).any()) and bool((safe.diff() <= 0).all())
    assert safe[8] < 0.5 * safe[0]


def test_mixture_pairs(mixture):
    """Every row has both kinds of pairs, and their ratios scatter by an order of magnitude: hence the quantile."""
    x = mixture.invert(mixture.y)
    report, least = (estimate_step_size(mixture.sample, x, quantile=q) for q in (0.1, 0.0))
    assert report.local_ratios.shape == (6, 128) and report.global_ratios.shape == (3, 128)
    assert report.num_function_evaluations == 6 and report.negative_fraction == 0.0
    both = torch.cat([report.local_ratios, report.global_ratios])
    assert both.max() > 10 * both.min() and bool((both.amin(0) == least.bound).all())
    assert bool((least.bound <= report.bound).all())


# ---- step size ---------------------------------------------------------------------------------------------


def test_every_pair_of_a_rotation_gives_its_bound():
    report = estimate_step_size(rotated, torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    for ratios in (report.local_ratios, report.global_ratios):
        torch.testing.assert_close(ratios, torch.full_like(ratios, 1.6), rtol=1e-4, atol=0)
    torch.testing.assert_close(report.bound, torch.full((3,), 1.6), rtol=1e-4, atol=0)
    assert report.local_ratios.shape == (6, 3) and report.global_ratios.shape == (3, 3)


def test_pairs_by_hand():
    seen = []

    def f(x):
        seen.append((x.double(), bent(x).double()))
        return bent(x)

    report = estimate_step_size(f, torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), quantile=0.25)
    start, near, far = seen[0], seen[1:4], seen[4:]
    for points, ratios in (([start, *near], report.local_ratios), ([start, *far], report.global_ratios)):
        pairs = [(a, b) for i, a in enumerate(points) for b in points[i + 1 :]]
        for (a, b), row in zip(pairs, ratios, strict=True):
            dx, df = a[0] - b[0], a[1] - b[1]
            torch.testing.assert_close(row.double(), 2 * (dx * df).sum(1) / df.square().sum(1), rtol=1e-3, atol=1e-5)
    both = torch.cat([report.local_ratios, report.global_ratios])
    assert report.negative_fraction == (both <= 0).double().mean().item()
    torch.testing.assert_close(report.bound, torch.where(both > 0, both, torch.nan).nanquantile(0.25, dim=0))


def test_step_sizes_that_do_not_exist():
    flipped = estimate_step_size(lambda x: -x, torch.ones(1, 3))
    assert flipped.negative_fraction == 1.0 and bool(flipped.bound.isnan().all())
    with pytest.raises(ValueError, match="`f` has the same value at all sampled points"):
        estimate_step_size(lambda x: x * 0, torch.ones(1, 3))
    for options in (
        {"local_points": -1},
        {"local_points": 0, "global_points": 0},
        {"local_scale": 0.0},
        {"quantile": 2},
    ):
        with pytest.raises(ValueError, match="; takes"):
            estimate_step_size(bent, torch.ones(1, 3), **options)


# ---- an edit in closed form --------------------------------------------------------------------------------


def test_an_edit_keeps_more_of_its_source_with_each_iteration():
    """Two classes at -1.5 and 1.5 along the first coordinate, content along the rest; the class is edited."""
    generator = torch.Generator().manual_seed(0)
    content = torch.tensor([1.0, 0.6, 1.5], dtype=torch.float64)
    deviation = torch.cat([torch.tensor([0.3], dtype=torch.float64), content])
    y = deviation * torch.randn(64, 4, generator=generator, dtype=torch.float64)
    y[:, 0] -= 1.5
    sigmas = torch.linspace(1, 0, 16, dtype=torch.float64)[2:].tolist()

    def velocity(x, sigma, side):
        mean = torch.tensor([side, 0.0, 0.0, 0.0], dtype=torch.float64)
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        return -mean + (sigma - (1 - sigma) * deviation**2) / variance * (x - (1 - sigma) * mean)

    def edited(x):
        x = x.double()
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (following - sigma) * velocity(x, sigma, 1.5)
        return x

    x0 = y.clone()
    for after, before in zip(sigmas[-2::-1], sigmas[:0:-1], strict=True):
        x0 = x0 + (after - before) * velocity(x0, before, -1.5)
    states = list(fixed_point(edited, y, x0, step_size=0.05, max_iterations=8))
    kept = [(state.value - y)[:, 1:].square().mean().sqrt().item() for state in states]
    side = [state.value[:, 0].mean().item() for state in states]
    assert kept[0] > 1.1 * kept[4] > 1.2 * kept[8]
    assert side[0] > side[4] > side[8] > 0.8  # on its way back to the source, and still edited
