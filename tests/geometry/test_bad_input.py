"""What cannot be used is refused by the argument's name, before any native code sees it."""

import pytest
import torch

from trimtab.geometry import (
    SlicedTarget,
    VonMisesFisher,
    chamfer_distance,
    distributional_sliced_wasserstein,
    earth_movers_distance,
    max_sliced_wasserstein,
    sample_directions,
    sinkhorn_divergence,
    sliced_wasserstein,
)

DISTANCES = [
    chamfer_distance,
    distributional_sliced_wasserstein,
    earth_movers_distance,
    max_sliced_wasserstein,
    sinkhorn_divergence,
    sliced_wasserstein,
]
X = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 8, dtype=torch.bool)

BAD_CLOUDS = {
    "list": ([[1.0]], X, TypeError, "`x` must be a torch.Tensor .* got list"),
    "integers": (X.long(), X, TypeError, "`x` must have a floating-point dtype .*int64"),
    "one axis": (X, X[0, 0], ValueError, r"`y` must have shape \(N, d\) or \(B, N, d\), got \(3,\)"),
    "no points": (X, X[:, :0], ValueError, r"`y` must have at least one .*\(2, 0, 3\)"),
    "no clouds": (X[:0], X[:0], ValueError, "`x` must have at least one"),
    "nan": (X, X.clone().index_fill_(1, torch.tensor([1]), torch.nan), ValueError, "`y` must be finite, got 6 values"),
    "inf": (X / 0, X, ValueError, "`x` must be finite"),
    "dimension": (X, X[..., :2], ValueError, "same dimension d, got 3 and 2"),
    "batch": (X, X[:1], ValueError, "batches of 2 and 1"),
    "axes": (X, X[0], ValueError, r"both \(B, N, d\)"),
}


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD_CLOUDS)
def test_clouds(distance, case):
    x, y, error, message = BAD_CLOUDS[case]
    with pytest.raises(error, match=message):
        distance(x, y)


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda f: f.__name__)
def test_single_points_are_fine(distance):
    x, y = torch.zeros(1, 3, requires_grad=True), torch.tensor([[2.0, 0.0, 0.0]])
    value = distance(x, y)
    assert value.ndim == 0 and value > 0
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.isfinite().all() and gradient[0, 0] < 0


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("root", [False, True])
def test_no_nan_where_the_clouds_are_equal(distance, root):
    if root and distance in (chamfer_distance, sinkhorn_divergence):
        root = False
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    value = distance(x, y, **({"root": True} if root else {}))
    torch.testing.assert_close(value, torch.zeros(2), rtol=0, atol=1e-5)
    for gradient in torch.autograd.grad(value.sum(), (x, y)):
        torch.testing.assert_close(gradient, torch.zeros_like(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize("distance", [f for f in DISTANCES if f is not sinkhorn_divergence], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (MASK.long(), TypeError, "`x_weights` must be a tensor of bool .*int64"),
        (MASK[:, :3], ValueError, r"`x_weights` must have shape \(2, 8\), got \(2, 3\)"),
        (~MASK, ValueError, "`x_weights` must be finite and >= 0, with a sum > 0"),
        (-MASK.float(), ValueError, "`x_weights` must be finite and >= 0"),
        (MASK.float() * torch.inf, ValueError, "`x_weights` must be finite"),
        (MASK.float().requires_grad_(), ValueError, "`x_weights` must not require a gradient"),
    ],
)
def test_weights(distance, weights, error, message):
    with pytest.raises(error, match=message):
        distance(X, X, x_weights=weights)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sliced_wasserstein(X, X, p=0.5), ValueError, "`p` must be a finite number >= 1, got 0.5"),
        (lambda: sliced_wasserstein(X, X, p="2"), TypeError, "`p` must be a finite number >= 1, got '2'"),
        (lambda: sliced_wasserstein(X, X, num_projections=0), ValueError, "`num_projections` must be .* got 0"),
        (lambda: sliced_wasserstein(X[..., :1], X[..., :1], num_projections=0), ValueError, "`num_projections`"),
        (lambda: sliced_wasserstein(X, X, directions="sobol"), ValueError, "`directions` must be one of iid"),
        (lambda: sliced_wasserstein(X, X, projections=X[0, :, :2]), ValueError, "`projections` must have shape"),
        (lambda: sliced_wasserstein(X, X, projections=X[0].long()), TypeError, "`projections`"),
        (lambda: sliced_wasserstein(X, X, reduction="sum"), ValueError, "`reduction` must be one of none"),
        (lambda: sliced_wasserstein(X, X, backend="cuda"), ValueError, "`backend` must be one of auto"),
        (lambda: sliced_wasserstein(X, X, chunk_size=0), ValueError, "`chunk_size` must be"),
        (lambda: sliced_wasserstein(X, X, pairwise=True, reduction="slices"), ValueError, "`pairwise`"),
        (lambda: sliced_wasserstein(X, X, pairwise=True, x_weights=X[..., 0].abs()), ValueError, "`pairwise`"),
        (lambda: sliced_wasserstein(X, SlicedTarget(X[0]), x_weights=MASK), ValueError, "SlicedTarget"),
        (lambda: sliced_wasserstein(X[..., :2], SlicedTarget(X[0])), ValueError, "`x` must have the target's dim"),
        (lambda: sliced_wasserstein(X[:1], SlicedTarget(X)), ValueError, "the target's 2 clouds"),
        (lambda: sliced_wasserstein(X / 0, SlicedTarget(X)), ValueError, "`x` must be finite"),
        (lambda: sliced_wasserstein(X, SlicedTarget(X), num_projections=0), ValueError, "`num_projections`"),
        (lambda: sliced_wasserstein(X, X, projections=X, pairwise=True), ValueError, r"`projections` .* \(L, d\)"),
        (lambda: SlicedTarget(X / 0), ValueError, "`cloud` must be finite"),
        (lambda: max_sliced_wasserstein(X, X, steps=-1), ValueError, "`steps` must be"),
        (lambda: max_sliced_wasserstein(X, X, learning_rate=0), ValueError, "`learning_rate` must be"),
        (lambda: max_sliced_wasserstein(X, X, direction=X[0]), ValueError, r"`direction` must be .* \(2, 3\)"),
        (lambda: distributional_sliced_wasserstein(X, X, kappa=0), ValueError, "`kappa` must be a finite number > 0"),
        (lambda: distributional_sliced_wasserstein(X, X, kappa=-1.0), ValueError, "`kappa` .* got -1.0"),
        (lambda: distributional_sliced_wasserstein(X, X, kappa=float("nan")), ValueError, "`kappa`"),
        (lambda: distributional_sliced_wasserstein(X, X, num_projections=0), ValueError, "`num_projections`"),
        (lambda: earth_movers_distance(X, X, p=0), ValueError, "`p` must be"),
        (lambda: sinkhorn_divergence(X, X, regularization=0), ValueError, "`regularization` must be"),
        (lambda: sample_directions(3, 0), ValueError, "`dim`"),
        (lambda: VonMisesFisher(X[0], 1.0), ValueError, "loc"),
        (lambda: VonMisesFisher(torch.ones(1), 1.0), ValueError, "`loc` must be unit vectors"),
        (lambda: VonMisesFisher(torch.eye(3), 0.0), ValueError, "`concentration` must be finite and > 0"),
        (lambda: VonMisesFisher(torch.eye(3), -1.0), ValueError, "`concentration`"),
    ],
)
def test_options(call, error, message):
    with pytest.raises(error, match=message):
        call()
