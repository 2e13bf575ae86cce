"""What each training optimizer owes torch: resuming, groups, closures, foreach, half precision, refusals, descent."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from trimtab.optim import DCTAdamW, Frugal, Lanton, Trion

SHAPES = ((24, 16), (12, 40), (16, 16), (16, 16))
MAKERS = {
    "frugal": lambda params, **options: Frugal(params, **{"update_gap": 3, **options}),
    "frugal rows": lambda params, **options: Frugal(params, projection="rows", **{"update_gap": 3, **options}),
    "frugal randk": lambda params, **options: Frugal(params, projection="randk", **{"update_gap": 3, **options}),
    "frugal svd": lambda params, **options: Frugal(params, projection="svd", **{"update_gap": 3, **options}),
    "frugal random full": lambda params, **options: Frugal(
        params, projection="random", side="full", **{"update_gap": 3, "density": 0.5, **options}
    ),
    "frugal dct": lambda params, **options: Frugal(
        params, projection="dct", reset_state=False, **{"update_gap": 3, **options}
    ),
    "frugal blockwise": lambda params, **options: Frugal(
        params, projection="blockwise", **{"update_gap": 3, "density": 0.5, **options}
    ),
    "frugal sgdm": lambda params, **options: Frugal(
        params, stateful="sgdm", state_free="sgd", **{"update_gap": 3, **options}
    ),
    "dct": lambda params, **options: DCTAdamW(params, **{"rank": 4, **options}),
    "dct 8bit": lambda params, **options: DCTAdamW(params, error_feedback="8bit", **{"rank": 4, **options}),
    "dct 4bit": lambda params, **options: DCTAdamW(params, error_feedback="4bit", **{"rank": 4, **options}),
    "dct full": lambda params, **options: DCTAdamW(params, error_feedback="full", **{"rank": 4, **options}),
    "trion": lambda params, **options: Trion(params, **{"rank": 4, "ns_dtype": torch.float32, **options}),
    "lanton": lambda params, **options: Lanton(params, **{"ns_dtype": torch.float32, **options}),
    "lanton interval": lambda params, **options: Lanton(
        params, noise_interval=3, nesterov=True, **{"ns_dtype": torch.float32, **options}
    ),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def walk(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
    return params


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def same_state(a, b):
    assert a.keys() == b.keys()
    for index, state in a.items():
        assert state.keys() == b[index].keys()
        for key, value in state.items():
            other = b[index][key]
            assert value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other), key


@ALL
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_the_same_to_the_bit(make, stop):
    whole = walk(make(params := weights(), lr=1e-2), params, range(8))
    first = make(params := weights(), lr=1e-2)
    walk(first, params, range(stop))
    saved = copy.deepcopy(first.state_dict())
    resumed = make(copied := [nn.Parameter(p.detach().clone()) for p in params], lr=1e-2)
    resumed.load_state_dict(saved)
    same_state(resumed.state_dict()["state"], saved["state"])
    walk(resumed, copied, range(stop, 8))
    assert_equal(copied, whole)


@ALL
def test_a_resumed_half_precision_run_keeps_float32_states(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole = walk(make(params := weights(torch.bfloat16), lr=1e-2), params, range(6))
        first = make(params := weights(torch.bfloat16), lr=1e-2)
        walk(first, params, range(4))
        resumed = make(params, lr=1e-2)
    resumed.load_state_dict(first.state_dict())
    dtypes = {value.dtype for state in resumed.state.values() for value in state.values()}
    assert torch.bfloat16 not in dtypes and torch.float32 in dtypes
    assert_equal(walk(resumed, params, range(4, 6)), whole)
    assert all(p.dtype == torch.bfloat16 and bool(torch.isfinite(p).all()) for p in params)


@ALL
def test_half_precision_weights_follow_float32_ones(make):
    full = walk(make(params := weights(), lr=1e-2), params, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        half = walk(make(params := weights(torch.bfloat16), lr=1e-2), params, range(3))
    for a, b in zip(half, full, strict=True):
        assert float((a.float() - b).detach().abs().mean()) < 1.5e-2


@ALL
def test_groups_have_their_own_rates_and_decay(make):
    params = weights()
    start = [p.detach().clone() for p in params]
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:2], "weight_decay": 0.5}, {"params": params[2:]}]
    optimizer = make(groups, lr=1e-2)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(params[0], start[0])
    torch.testing.assert_close(params[1].detach(), start[1] * (1 - 1e-2 * 0.5))
    walk(optimizer, params, range(2))
    assert torch.equal(params[0], start[0]) and not torch.equal(params[2], start[2])


@ALL
def test_a_closure_runs_with_gradients_and_its_loss_comes_back(make):
    params = weights()
    optimizer = make(params, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        before = float(sum(p.square().sum() for p in params))
    assert float(optimizer.step(closure).detach()) == pytest.approx(before)
    assert float(closure().detach()) < before


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "trion"])
def test_foreach_equals_one_tensor_at_a_time(name):
    one = walk(MAKERS[name](params := weights(), lr=1e-2, foreach=False), params, range(7))
    every = walk(MAKERS[name](params := weights(), lr=1e-2, foreach=True), params, range(7))
    for a, b in zip(every, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@ALL
def test_gradients_stay_and_missing_ones_are_passed_over(make):
    params = weights()
    optimizer = make(params, lr=1e-2)
    set_gradients(params, 0)
    params[1].grad = None
    before, start = [p.grad.clone() for p in params if p.grad is not None], params[1].detach().clone()
    optimizer.step()
    assert_equal([p.grad for p in params if p.grad is not None], before)
    assert torch.equal(params[1], start)
    walk(optimizer, params, range(1, 5))  # its first gradient comes late
    assert not torch.equal(params[1], start)


@ALL
def test_sparse_and_complex_ones_are_refused_by_name(make):
    params = weights()
    optimizer = make([(f"layer{i}", p) for i, p in enumerate(params)], lr=1e-2)
    set_gradients(params, 0)
    params[2].grad = params[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients; layer2 of shape \(16, 16\)"):
        optimizer.step()
    complex_weight = nn.Parameter(torch.ones(16, 16, dtype=torch.complex64))
    complex_weight.grad = torch.ones_like(complex_weight)
    with pytest.raises(RuntimeError, match="complex"):
        make([complex_weight], lr=1e-2).step()


@pytest.mark.parametrize("name", ["frugal svd", "frugal dct", "dct", "trion", "lanton"])
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    params = weights()
    optimizer = MAKERS[name](params, lr=1e-2)
    walk(optimizer, params, range(3))
    saved, kept = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
    set_gradients(params, 3)
    params[3].grad[2, 2] = math.nan
    with pytest.raises(RuntimeError, match=r"finite gradients; that of parameter 3 of its group of shape \(16, 16\)"):
        optimizer.step()
    same_state(optimizer.state_dict()["state"], saved)
    assert_equal(params, kept)


BAD = [
    ("frugal", {"lr": -1.0}, "`lr` is -1.0"),
    ("frugal", {"density": 1.5}, "`density` is 1.5"),
    ("frugal", {"update_gap": 0}, "`update_gap` is 0"),
    ("frugal", {"betas": (0.9, 1.0)}, r"`betas\[1\]` is 1.0"),
    ("frugal", {"betas": 0.9}, "`betas` is 0.9"),
    ("frugal", {"eps": -1e-8}, "`eps`"),
    ("frugal", {"state_free": "lion"}, "`state_free` is 'lion'"),
    ("frugal", {"stateful": "lion"}, "`stateful` is 'lion'"),
    ("frugal", {"block_order": "up"}, "`block_order` is 'up'"),
    ("frugal", {"weight_decay": math.inf}, "`weight_decay`"),
    ("frugal dct", {"side": "full"}, "`side` is 'full'"),
    ("dct", {"rank": 0}, "`rank` is 0"),
    ("dct", {"basis": "fourier"}, "`basis` is 'fourier'"),
    ("dct", {"norm": 3}, "`norm` is 3"),
    ("dct", {"update_gap": 0}, "`update_gap` is 0"),
    ("trion", {"scale": "big"}, "`scale` is 'big'"),
    ("trion", {"momentum": 1.0}, "`momentum` is 1.0"),
    ("lanton", {"alpha": 0.0}, "`alpha` is 0.0"),
    ("lanton", {"noise_beta": 1.0}, "`noise_beta` is 1.0"),
    ("lanton", {"min_scale": 2.0}, "`min_scale` is 2.0"),
    ("lanton", {"kind": "nuclear"}, "unexpected keyword"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_input_is_named(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MAKERS[name](weights(), **options)


@pytest.mark.parametrize("kind", [Frugal, Trion, Lanton])
def test_vectors_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"bias of shape \(5,\)"):
        kind([("weight", nn.Parameter(torch.ones(5, 5))), ("bias", nn.Parameter(torch.ones(5)))])


def test_a_refused_group_leaves_no_trace():
    optimizer = Lanton(weights())
    with pytest.raises(ValueError, match="matrices only"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1


QUICK = {"frugal": 0.05, "dct": 0.3, "trion": 0.3, "lanton": 0.1}
SLOW = {
    **dict.fromkeys(("frugal rows", "frugal randk", "frugal svd", "frugal random full", "frugal dct"), 0.05),
    **{"frugal blockwise": 0.05, "dct 8bit": 0.3, "dct 4bit": 0.3, "dct full": 0.3, "lanton interval": 0.1},
}
SIZES = [*QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())]


@pytest.mark.parametrize(("name", "rate"), SIZES)
def test_a_quadratic_goes_to_a_thousandth_under_cosine_decay(name, rate):
    params = weights()[:2]
    options = {"update_gap": 20} if "frugal" in name else {"momentum": 0.8} if name == "trion" else {}
    optimizer = MAKERS[name](params, lr=rate, weight_decay=0.0, **options)
    scales = torch.logspace(-1, 0, 16)  # condition number 10 along the last axis
    weighted = [scales[torch.arange(p.shape[1]) % 16] for p in params]

    def loss():
        return sum(((p - 0.3).square() * weight).sum() for p, weight in zip(params, weighted, strict=True))

    start = float(loss().detach())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    assert float(loss().detach()) < 1e-3 * start


@pytest.mark.parametrize("name", ["frugal", "frugal svd", "dct", "trion", "lanton"])
def test_torch_compile_leaves_the_step_as_it_is(name):
    plain = walk(MAKERS[name](params := weights(), lr=1e-2), params, range(3))
    compiled = MAKERS[name](params := weights(), lr=1e-2)
    step = torch.compile(compiled.step, backend="eager")
    for number in range(3):
        set_gradients(params, number)
        step()
    assert_equal(params, plain)
