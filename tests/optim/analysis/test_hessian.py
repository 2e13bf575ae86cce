"""Spectra against dense Hessians of torch.func, scipy's eigensolver, closed forms and the paper's count of outliers."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from trimtab.optim import (
    SymmetricOperator,
    count_outliers,
    data_hessian_operator,
    hessian_operator,
    hessian_spectrum,
    hutchinson_trace,
    interpolate_loss,
    lanczos,
    top_eigenpairs,
)

# torch's own, at the first use of torch.func's forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n, seed=0):
    a = randn(n, n, seed=seed)
    return a + a.T


def clusters(k, norm=1.0, n=300, d=20):
    centres = torch.linalg.qr(randn(d, d, seed=k)).Q[:k] * norm
    y = torch.arange(n) % k
    return centres[y] + randn(n, d, seed=100 + k) / d**0.5, y


def trained(k, width, norm=1.0):
    x, y = clusters(k, norm)
    torch.manual_seed(0)
    layers = nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, k)
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


@pytest.fixture(scope="module")
def net():
    """A trained net, its data, and its dense Hessian by forward over reverse."""
    model, x, y = trained(5, 12)
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(w):
        parts = w.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, weights, (x,))

    dense = torch.func.hessian(lambda w: cross_entropy(outputs(w), y))(flat)
    return model, x, y, dense, torch.func.jacrev(outputs)(flat).detach()


def test_lanczos_is_exact_in_the_whole_space():
    op = SymmetricOperator.from_matrix(torch.diag(torch.arange(1.0, 51, dtype=torch.float64)))
    result = lanczos(op, 50)
    torch.testing.assert_close(result.ritz_values, torch.arange(1.0, 51, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(result.weights.sum()) == pytest.approx(1, abs=1e-12) and float(result.residuals.max()) < 1e-8
    torch.testing.assert_close(
        result.vectors.T @ result.vectors, torch.eye(50, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert op.num_products == 50 and result.breakdown


def test_quadrature_is_exact_on_moments_below_twice_its_steps():
    matrix, m = symmetric(30), 4
    start = randn(30, seed=1)
    unit = start / start.norm()
    for keep in (True, False):
        result = lanczos(SymmetricOperator.from_matrix(matrix), m, start=start, reorthogonalize=keep)
        power = unit
        for q in range(2 * m):
            moment = float((result.weights * result.ritz_values**q).sum())
            assert moment == pytest.approx(float(unit @ power), rel=1e-9), q
            power = matrix @ power
        assert moment != pytest.approx(float(unit @ power), rel=1e-4)  # of degree 2 m it is not


def test_without_reorthogonalization_eigenvalues_come_several_times():
    matrix = torch.diag(torch.cat([torch.linspace(0, 1, 98), torch.tensor([50.0, 100.0])]).double())
    bare, full = (lanczos(SymmetricOperator.from_matrix(matrix), 60, reorthogonalize=keep) for keep in (False, True))
    assert int((bare.ritz_values > 99).sum()) > 1 and int((full.ritz_values > 99).sum()) == 1
    assert bare.vectors is None


def test_breakdown_is_an_answer():
    zero = lanczos(SymmetricOperator.from_matrix(torch.zeros(5, 5)), 4)
    assert zero.ritz_values.tolist() == [0.0] and zero.weights.tolist() == [1.0] and zero.breakdown
    spectrum = hessian_spectrum(SymmetricOperator.from_matrix(torch.zeros(5, 5)))
    assert spectrum.lambda_max == 0 and spectrum.trace == 0 and spectrum.max_learning_rate == math.inf
    projector = torch.zeros(20, 20)
    projector[:2, :2] = torch.eye(2)
    assert lanczos(SymmetricOperator.from_matrix(projector), 20).ritz_values.tolist() == pytest.approx(
        [0, 1], abs=1e-12
    )
    assert top_eigenpairs(SymmetricOperator.from_matrix(torch.eye(6)), 3).values.tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_eigenpairs_are_those_of_scipy(which):
    matrix = symmetric(60, seed=2)
    found = top_eigenpairs(SymmetricOperator.from_matrix(matrix), 5, which=which, tol=1e-9, eigenvectors=True)
    wanted = eigsh(matrix.numpy(), 5, which=which, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found.values.numpy()), np.sort(wanted), atol=1e-8)
    assert bool(found.converged.all())
    largest = top_eigenpairs(SymmetricOperator.from_matrix(matrix), 1, which=which, tol=1e-6)
    exact = torch.linalg.eigvalsh(matrix)
    wanted = {"LA": exact[-1], "SA": exact[0], "LM": exact[exact.abs().argmax()], "BE": exact[-1]}[which]
    assert float((largest.values[0] - wanted).abs()) < 1e-6 * float(exact.abs().max())
    errors = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(errors, found.residuals, atol=1e-9, rtol=1e-3)


def test_closed_forms():
    x, y = randn(40, 6), randn(40, seed=3)
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    op = hessian_operator(lambda: (x @ w - y).square().mean() / 2, w)
    torch.testing.assert_close(op(torch.eye(6, dtype=torch.float64)), x.T @ x / 40, atol=1e-12, rtol=0)
    weights, labels = randn(6, 4, seed=4).requires_grad_(), torch.arange(40) % 4
    op = hessian_operator(lambda: cross_entropy(x @ weights, labels), weights)
    p = (x @ weights.detach()).softmax(1)
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    wanted = torch.einsum("nd,ne,nkl->dkel", x, x, curved).reshape(24, 24) / 40
    torch.testing.assert_close(op(torch.eye(24, dtype=torch.float64)), wanted, atol=1e-12, rtol=0)


def test_a_trained_net_against_its_dense_hessian(net):
    model, x, y, dense, jacobian = net
    exact = torch.linalg.eigvalsh(dense)
    by_closure = hessian_operator(lambda: cross_entropy(model(x), y), model.parameters())
    batches = [(x[:100], y[:100]), (x[100:], y[100:])]
    by_data = data_hessian_operator(model, nn.CrossEntropyLoss(), batches)
    probes = randn(len(dense), 3, seed=5)
    for op in (by_closure, by_data):
        torch.testing.assert_close(op(probes), dense @ probes, atol=1e-10, rtol=1e-10)
    top = lanczos(by_closure, 40, generator=torch.Generator().manual_seed(1)).ritz_values[-4:]
    torch.testing.assert_close(top, exact[-4:], atol=1e-10, rtol=1e-10)
    p = model(x).detach().softmax(1)
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gauss_newton = torch.einsum("nkm,nkl,nlo->mo", jacobian, curved, jacobian) / len(x)
    op = data_hessian_operator(model, nn.CrossEntropyLoss(), batches, matrix="gauss_newton")
    torch.testing.assert_close(op(probes), gauss_newton @ probes, atol=1e-10, rtol=1e-10)
    assert float((exact[-4:] - torch.linalg.eigvalsh(gauss_newton)[-4:]).abs().max()) < 0.01 * float(exact[-1])


def test_the_spectrum_against_the_dense_one(net):
    model, x, y, dense, _ = net
    exact = torch.linalg.eigvalsh(dense)
    width = float(exact[-1] - exact[0])
    op = SymmetricOperator.from_matrix(dense)  # the products are checked above
    for probes, limit in ((1, 0.003), (16, 0.0015)):
        spectrum = hessian_spectrum(op, num_probes=probes, generator=torch.Generator().manual_seed(2))
        order = spectrum.nodes.argsort()
        grid = torch.linspace(float(exact[0]), float(exact[-1]), 4001, dtype=torch.float64)
        below = torch.searchsorted(spectrum.nodes[order], grid, right=True)
        ours = torch.cat([torch.zeros(1, dtype=torch.float64), spectrum.weights[order].cumsum(0)])[below]
        theirs = torch.searchsorted(exact, grid, right=True).double() / len(exact)
        assert float((ours - theirs).abs().mean()) <= limit  # W1 over the range
    assert abs(spectrum.trace - float(exact.sum())) < 3 * spectrum.trace_std
    assert spectrum.frobenius_sq == pytest.approx(float(exact.square().sum()), rel=0.3)
    assert spectrum.lambda_max == pytest.approx(float(exact[-1]), rel=1e-8)
    assert spectrum.lambda_min == pytest.approx(float(exact[0]), abs=1e-4 * width)
    torch.testing.assert_close(spectrum.top[:4], exact.flip(0)[:4], rtol=1e-8, atol=0)
    assert (spectrum.num_outliers, spectrum.gap_ratio) == pytest.approx(count_outliers(exact), rel=1e-6)
    assert float(torch.trapezoid(spectrum.density, spectrum.grid)) == pytest.approx(1, abs=0.01)
    mean, error = hutchinson_trace(op, 64)
    assert abs(mean - float(exact.sum())) < 3 * error
    assert spectrum.picture().size == (640, 320)


@pytest.mark.parametrize(("k", "width"), [(3, 12), (5, 24)])
def test_one_outlier_fewer_than_classes(k, width):
    model, x, y = trained(k, width)
    spectrum = hessian_spectrum(
        hessian_operator(lambda: cross_entropy(model(x), y), model.parameters()), num_steps=40, num_probes=1
    )
    assert spectrum.num_outliers == k - 1 and spectrum.gap_ratio > 1.8
    assert -0.05 * spectrum.lambda_max < spectrum.lambda_min < 0


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 5, 8])
def test_outliers_follow_the_classes_and_not_the_width(k):
    tops = []
    for width in (12, 24, 40):
        model, x, y = trained(k, width)
        op = hessian_operator(lambda: cross_entropy(model(x), y), model.parameters())  # noqa: B023 (used at once)
        spectrum = hessian_spectrum(op, num_steps=60, num_probes=1)
        assert spectrum.num_outliers == k - 1, (width, spectrum.top)
        tops.append(spectrum.lambda_max)
    # Eight classes are fitted the less, the narrower the net, which leaves it more curvature.
    assert max(tops) / min(tops) < 1.4 if k < 8 else tops == sorted(tops, reverse=True)


def test_finite_differences_need_no_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].cos()

    for dtype, rel in ((torch.float32, 2e-2), (torch.float64, 1e-6)):
        z = randn(50).to(dtype).requires_grad_()
        before, v = z.detach().clone(), randn(50, seed=1)

        def loss():
            return Once.apply(z).square().sum()  # noqa: B023 (used at once)

        op = hessian_operator(loss, z, method="finite_difference")
        wanted = 2 * (2 * before.double()).cos() * v
        assert float((op(v) - wanted).norm() / wanted.norm()) < rel
        assert torch.equal(z.detach(), before)
        with pytest.raises(RuntimeError, match="without a second derivative"):
            hessian_operator(loss, z)(v)


def test_attention_has_curvature():
    q = randn(1, 2, 5, 4).float().requires_grad_()
    k, v = randn(1, 2, 5, 4, seed=1).float(), randn(1, 2, 5, 4, seed=2).float()

    def by_hand(flat):
        weights = (flat.view(q.shape) @ k.transpose(-1, -2) / 2).softmax(-1)
        return (weights @ v).square().sum()

    dense = torch.func.hessian(by_hand)(q.detach().flatten())
    for attend in (
        scaled_dot_product_attention,
        lambda *args: checkpoint(scaled_dot_product_attention, *args, use_reentrant=False),
    ):
        op = hessian_operator(lambda: attend(q, k, v).square().sum(), q)  # noqa: B023 (used at once)
        torch.testing.assert_close(op(torch.eye(40, dtype=torch.float64)).float(), dense, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing():
    x = randn(3, 4)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    ops = [
        hessian_operator(lambda: checkpoint(layer, x, use_reentrant=False).square().sum(), layer.parameters()),
        hessian_operator(lambda: layer(x).square().sum(), layer.parameters(), keep_graph=False),
    ]
    v = randn(20)
    for _ in range(2):
        torch.testing.assert_close(ops[0](v), ops[1](v))
    given = x.clone().requires_grad_()
    entrant = hessian_operator(lambda: checkpoint(layer, given, use_reentrant=True).sum(), layer.parameters())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        entrant(v)


def test_models_are_measured_as_they_are_used():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model(randn(8, 3))
    model[2].eval()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    op = data_hessian_operator(model, nn.MSELoss(), [(randn(8, 3), randn(8, 2))])
    v = randn(op.size)
    torch.testing.assert_close(op(v), op(v))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_flat_directions():
    a, unused = randn(3).requires_grad_(), randn(2).requires_grad_()
    op = hessian_operator(lambda: a.pow(2).sum(), [a, unused])
    assert op(torch.ones(5, dtype=torch.float64)).tolist() == [2, 2, 2, 0, 0]
    assert [part.shape for part in op.split(torch.ones(5))] == [(3,), (2,)]
    assert hessian_operator(lambda: a.sum(), a)(torch.ones(3)).tolist() == [0, 0, 0]


def test_progress_and_an_early_end():
    op, seen = SymmetricOperator.from_matrix(symmetric(40)), []
    spectrum = hessian_spectrum(op, num_steps=20, num_probes=3, callback=lambda n, of: seen.append((n, of)) or n == 25)
    assert seen == [(n, 60) for n in range(1, 26)] and spectrum.num_products == 25
    assert float(spectrum.weights.sum()) == pytest.approx(1)


def test_the_path_between_two_solutions():
    double_well = interpolate_loss(lambda w: (w.square() - 1).square().sum(), -torch.ones(1), torch.ones(1))
    assert double_well.barrier == pytest.approx(1) and double_well.worst == pytest.approx(0.5)
    valley = interpolate_loss(lambda w: w[1].square(), torch.tensor([-3.0, 0]), torch.tensor([5.0, 0]))
    assert valley.barrier == 0 and len(valley.loss) == 25
    norms = interpolate_loss(lambda z: z.norm(), randn(500), randn(500, seed=1), path="spherical").loss
    assert float((norms - torch.linspace(float(norms[0]), float(norms[-1]), 25)).abs().max()) < 1e-5
    assert float(interpolate_loss(lambda z: z.norm(), randn(500), randn(500, seed=1)).loss.min()) < 0.8 * norms[0]
    first, second = nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict()
    second["weight"] = torch.full((2,), 3.0)
    path = interpolate_loss(lambda w: w["weight"].sum() + 0 * w["num_batches_tracked"], first, second, 3)
    assert path.loss.tolist() == [2, 4, 6]


def test_bad_input():
    z = torch.ones(2, requires_grad=True)
    op = SymmetricOperator.from_matrix(torch.eye(3))
    noisy = iter(range(9))
    for error, match, call in (
        (ValueError, "requires no gradient", lambda: hessian_operator(lambda: z.sum(), torch.ones(2))),
        (ValueError, "`params` is empty", lambda: hessian_operator(lambda: z.sum(), [])),
        (TypeError, "bfloat16", lambda: hessian_operator(lambda: z.sum(), z.detach().bfloat16())),
        (ValueError, r"the loss is shape \(2,\)", lambda: hessian_operator(lambda: z, z)),
        (RuntimeError, "at two calls", lambda: hessian_operator(lambda: z.sum() * next(noisy), z)),
        (ValueError, "depends on none", lambda: hessian_operator(lambda: torch.ones(()), z)(torch.ones(2))),
        (RuntimeError, "not finite in parameter 0", lambda: hessian_operator(lambda: (z - 1).pow(1.5).sum(), z)(z)),
        (ValueError, "`method` is 'forward'", lambda: hessian_operator(lambda: z.sum(), z, method="forward")),
        (ValueError, "`num_steps` is 0", lambda: lanczos(op, 0)),
        (ValueError, "`start` has shape", lambda: lanczos(op, start=torch.ones(2))),
        (ValueError, "`k` is 4", lambda: top_eigenpairs(op, 4)),
        (ValueError, "`v` has shape", lambda: op(torch.ones(2))),
        (ValueError, "not symmetric", lambda: SymmetricOperator.from_matrix(torch.tensor([[0.0, 1], [0, 0]]))),
        (TypeError, "only once", lambda: data_hessian_operator(nn.Linear(1, 1), nn.MSELoss(), iter([]))),
        (ValueError, "`batches` is empty", lambda: data_hessian_operator(nn.Linear(1, 1), nn.MSELoss(), [])),
        (ValueError, "at t = 0", lambda: interpolate_loss(lambda w: math.nan, z, z)),
        (ValueError, "same names", lambda: interpolate_loss(lambda w: 0.0, {"a": z}, {"b": z})),
        (ValueError, "for tensors by name", lambda: interpolate_loss(lambda w: 0.0, {}, {}, path="spherical")),
    ):
        with pytest.raises(error, match=match):
            call()
