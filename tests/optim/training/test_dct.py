"""The cosine basis against scipy, its choice of columns against the contraction, DCT-AdamW and Trion against AdamW."""

import pytest
import scipy.fft
import torch
from torch import nn

from trimtab.optim import DCTAdamW, Trion, dct2_rows, dct_matrix, project_back, select_columns
from trimtab.optim.training.dct import basis_columns
from trimtab.optim.training.error_feedback import pack_rows, unpack_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_matrix_is_orthogonal():
    Q = dct_matrix(33, dtype=torch.float64)
    torch.testing.assert_close(Q @ Q.T, torch.eye(33, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["fft", "matmul", "auto"])
@pytest.mark.parametrize("n", [1, 2, 3, 33, 64, 1024])
def test_the_transform_is_scipys(n, method):
    x = torch.randn(5, n, generator=generator(), dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho"))
    torch.testing.assert_close(dct2_rows(x, method=method), expected, rtol=0, atol=1e-12 * max(1, n**0.5))
    single = dct2_rows(x.float(), method=method)
    assert float((single - expected).abs().max()) < 1e-6 * float(x.abs().max()) * max(1.0, n**0.25)


def test_columns_made_one_by_one_are_the_matrixs():
    indices = torch.tensor([0, 3, 1023, 1500], dtype=torch.int32)
    torch.testing.assert_close(
        basis_columns(indices, 1501, "dct", torch.float64), dct_matrix(1501, dtype=torch.float64)[indices.long()]
    )


@pytest.mark.parametrize("rank", [1, 16, 48])
def test_the_error_keeps_the_contraction(rank):
    for seed in range(30):
        G = torch.randn(512, 64, generator=generator(seed))
        low, selection = select_columns(G, rank)
        error = (G - project_back(low, selection, (512, 64))).square().sum() / G.square().sum()
        assert float(error) <= 1 - rank / 64 + 1e-6


@pytest.mark.parametrize("basis", ["dct", "random", "identity"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_all_columns_give_the_matrix_back(shape, side, basis):
    G = torch.randn(shape, generator=generator())
    n = {"left": shape[0], "right": shape[1], None: min(shape)}[side]
    low, selection = select_columns(G, n, side=side, basis=basis)
    torch.testing.assert_close(project_back(low, selection, shape, basis=basis), G, rtol=1e-5, atol=1e-5)


def test_the_choice_is_the_best_of_all_subsets():
    G = torch.randn(20, 6, generator=generator(1))
    low, selection = select_columns(G, 2)
    columns = dct_matrix(6)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    best = max(float((G @ columns[list(pair)].T).square().sum()) for pair in pairs)
    assert float(low.square().sum()) == pytest.approx(best, rel=1e-5)


def test_smooth_signals_need_few_cosines():
    """The sheet's first row: gradients of weights that act on smooth signals; a random basis has no such luck."""
    k = torch.arange(1, 17, dtype=torch.float64)
    t = torch.linspace(0, 1, 256, dtype=torch.float64)
    phases = torch.rand(128, 16, generator=generator(2), dtype=torch.float64) * 2 * torch.pi
    amplitudes = torch.randn(128, 16, generator=generator(3), dtype=torch.float64) / k
    X = (amplitudes[:, :, None] * torch.cos(torch.pi * k[:, None] * t / 2 + phases[:, :, None])).sum(1)
    G = torch.randn(512, 128, generator=generator(4), dtype=torch.float64) @ X

    def error(basis):
        low, selection = select_columns(G, 16, basis=basis, side="right")
        return float((G - project_back(low, selection, (512, 256), basis=basis)).norm() / G.norm())

    assert error("dct") <= 0.1 * error("random")
    values = torch.linalg.svdvals(G)
    assert error("dct") >= float(values[16:].norm() / values.norm())


def test_moments_turn_as_the_columns_do():
    """R = P_prev^T P is the 0/1 matrix of equal indices, and the moments after a turn are m R."""
    G = [torch.randn(24, 16, generator=generator(seed)) for seed in range(3)]
    W = nn.Parameter(torch.zeros(24, 16))
    optimizer = DCTAdamW([W], rank=6, betas=(0.5, 0.5))
    m, previous = torch.zeros(24, 16), None
    for gradient in G:
        W.grad = gradient
        optimizer.step()
        indices = optimizer.state[W]["indices"]
        P = dct_matrix(16)[indices.long()].T
        if previous is not None:
            R = dct_matrix(16)[previous.long()] @ P
            torch.testing.assert_close(R, (previous[:, None] == indices[None]).float(), rtol=0, atol=1e-6)
        coefficients = gradient @ dct_matrix(16).T
        stays = torch.zeros(16, dtype=torch.bool)
        stays[indices.long()] = True
        m = torch.where(stays, 0.5 * m + 0.5 * coefficients, 0.0)
        torch.testing.assert_close(optimizer.state[W]["exp_avg"], m[:, stays], rtol=1e-4, atol=1e-5)
        previous = indices.clone()


def test_feedback_sends_all_of_a_constant_gradient_in_time():
    """SGD-like check of the error: what is kept and what was sent add up to the sum of the gradients."""
    W = nn.Parameter(torch.zeros(12, 40))
    optimizer = DCTAdamW([W], rank=3, error_feedback="full")
    gradient, sent = torch.randn(12, 40, generator=generator(5)), torch.zeros(12, 40)
    error = torch.zeros(12, 40)
    for step in range(1, 9):
        W.grad = gradient.clone()
        optimizer.step()
        low, selection = select_columns(gradient + error, 3, side="left")
        sent += project_back(low, selection, (12, 40))
        error = optimizer.state[W]["error"]
        torch.testing.assert_close(sent + error, step * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_rows_are_off_by_half_a_spacing_at_most(bits):
    x = torch.randn(7, 33, generator=generator(6))
    x[3] = 2.5
    codes, low, spacing = pack_rows(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (7, 33 if bits == 8 else 17)
    back = unpack_rows(codes, low, spacing, 33)
    assert bool(((back - x).abs() <= 0.5001 * spacing + 1e-6).all())
    assert torch.equal(back[3], x[3])


@pytest.mark.parametrize(
    ("feedback", "bytes_of_error"), [(None, 0), ("full", 4 * 512 * 256), ("8bit", 512 * (256 + 8))]
)
def test_the_state_is_the_moments_and_the_indices(feedback, bytes_of_error):
    W = nn.Parameter(torch.zeros(512, 256))
    W.grad = torch.randn(512, 256, generator=generator(7))
    optimizer = DCTAdamW([W], rank=64, error_feedback=feedback)
    optimizer.step()
    sizes = {name: value.numel() * value.element_size() for name, value in optimizer.state[W].items()}
    assert sizes.pop("exp_avg") == sizes.pop("exp_avg_sq") == 4 * 512 * 64
    assert sizes.pop("indices") == 4 * 64 and sizes.pop("step") == 4
    assert sum(sizes.values()) == bytes_of_error


def test_small_and_excluded_tensors_get_adamw():
    shapes = ((6, 40), (40,), (50, 64), (16, 16))
    params, twins = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    groups = [{"params": params[:3]}, {"params": params[3:], "projected": False}]
    optimizers = [DCTAdamW(groups, 1e-2, rank=8, max_dim=64), torch.optim.AdamW(twins, 1e-2, weight_decay=0.0)]
    for step in range(3):
        for set_of in (params, twins):
            for number, p in enumerate(set_of):
                p.grad = torch.randn(p.shape, generator=generator(10 * step + number))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_one_column_less_than_all_is_adam_in_the_cosine_basis():
    """With the gradient inside the chosen columns the step is Adam's on the transform."""
    columns = dct_matrix(16)[[1, 4, 5]]
    low = torch.randn(24, 3, generator=generator(8))
    W, twin = nn.Parameter(torch.zeros(24, 16)), nn.Parameter(torch.zeros(24, 3))
    optimizer, other = DCTAdamW([W], 0.1, rank=3), torch.optim.AdamW([twin], 0.1, weight_decay=0.0)
    for scale in (1.0, -0.5, 2.0):
        W.grad, twin.grad = scale * low @ columns, scale * low
        optimizer.step()
        other.step()
    torch.testing.assert_close(W.detach(), twin.detach() @ columns, rtol=1e-4, atol=1e-5)


def test_a_zero_gradient_keeps_the_columns():
    W = nn.Parameter(torch.zeros(24, 16))
    optimizer = DCTAdamW([W], rank=4)
    W.grad = torch.randn(24, 16, generator=generator(9))
    optimizer.step()
    kept = optimizer.state[W]["indices"].clone()
    W.grad = torch.zeros(24, 16)
    optimizer.step()
    assert torch.equal(optimizer.state[W]["indices"], kept)
    assert float(optimizer.state[W]["exp_avg"].abs().sum()) > 0


def test_mixing_moments_is_warned_of():
    with pytest.warns(UserWarning, match="moments of different columns"):
        DCTAdamW([nn.Parameter(torch.ones(8, 8))], rotate=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dct_matrix(0), "`n` is 0"),
        (lambda: dct2_rows(torch.ones(0)), "`x` has shape"),
        (lambda: dct2_rows(torch.ones(3), method="slow"), "`method` is 'slow'"),
        (lambda: select_columns(torch.ones(3), 1), "`G` has shape"),
        (lambda: select_columns(torch.ones(3, 4), 4), "`rank` is 4; takes at most 3"),
        (lambda: select_columns(torch.ones(3, 4), 1, p=3), "`p` is 3"),
        (lambda: select_columns(torch.ones(3, 4), 1, side="up"), "`side` is 'up'"),
        (lambda: project_back(torch.ones(2, 2), select_columns(torch.ones(3, 4), 1)[1], (3, 4)), "`low` has shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_trion_with_all_columns_and_no_memory_is_muon():
    """At full rank the transform cancels: one step of torch.optim.Muon from the same momentum."""
    gradient = torch.randn(24, 16, generator=generator(10))
    W, twin = nn.Parameter(torch.ones(24, 16)), nn.Parameter(torch.ones(24, 16))
    W.grad, twin.grad = gradient.clone(), gradient.clone()
    Trion([W], 0.1, rank=16, weight_decay=0.1, ns_dtype=torch.float32).step()
    torch.optim.Muon([twin], 0.1, weight_decay=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(W.detach(), twin.detach(), rtol=2e-2, atol=2e-3)


def test_trion_lets_decay_what_it_sent():
    W = nn.Parameter(torch.zeros(24, 16))
    W.grad = torch.randn(24, 16, generator=generator(11))
    optimizer = Trion([W], rank=4, momentum=0.75)
    optimizer.step()
    coefficients = optimizer.state[W]["momentum_buffer"] @ dct_matrix(16).T
    before = W.grad @ dct_matrix(16).T
    ratios = (coefficients / before).mean(0).sort().values
    torch.testing.assert_close(ratios, torch.tensor([0.75] * 4 + [1.0] * 12), rtol=0, atol=1e-4)
