"""Batch tests against hand examples and known noise, their controller under accelerate; AdaGrad-Norm."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trimtab.optim import (
    AdaGradNorm,
    AdaptiveBatchSampler,
    AdaptiveBatchSize,
    augmented_inner_product_test,
    coordinate_norm_test,
    inner_product_test,
    norm_test,
    norm_test_from_microbatches,
    per_sample_grads,
)
from trimtab.optim.training.adaptive_batch import MicrobatchNoise
from trimtab.optim.training.batch_criteria import norm_test_from_moments

HAND = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [2.0, -1.0]])


def test_hand_example():
    assert norm_test(HAND, debias=False).required == pytest.approx(4 / 3, abs=1e-6)
    assert inner_product_test(HAND, debias=False).required == pytest.approx(2 / 3, abs=1e-6)
    assert augmented_inner_product_test(HAND, theta=5.0, debias=False).required == pytest.approx(1 / 6, abs=1e-6)
    assert augmented_inner_product_test(HAND, debias=False).required == pytest.approx(2 / 3, abs=1e-6)
    assert coordinate_norm_test(HAND, debias=False).required == math.inf  # the second coordinate's mean is 0
    first = coordinate_norm_test(HAND[:, :1], debias=False)
    assert first.required == pytest.approx(2 / 3 / (0.25 * 4), abs=1e-6) and first.passed
    # without its bias ||mean||^2 is 4 - (4 / 3) / 4
    assert norm_test(HAND).required == pytest.approx((4 / 3) / (0.25 * (4 - 1 / 3)), abs=1e-6)


def test_pure_noise_asks_for_one_over_eta_squared_times_the_batch():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 64, 200, generator=generator)
    ratio = sum(norm_test(draw, debias=False).required / 64 for draw in draws) / 200
    assert ratio == pytest.approx(4.0, abs=0.15)
    debiased = [norm_test(draw).required for draw in draws]
    assert sum(map(math.isinf, debiased)) > 60  # where the estimate of the signal is negative


def test_known_signal():
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(50).index_fill(0, torch.tensor([3]), 4.0)
    grads = mean + 2.0 * torch.randn(4000, 50, generator=generator)
    assert norm_test(grads).required == pytest.approx(50, rel=0.1)
    assert inner_product_test(grads).required == pytest.approx(1, rel=0.1)
    assert augmented_inner_product_test(grads).required == pytest.approx(12.25, rel=0.1)


@pytest.mark.parametrize("test", [norm_test, inner_product_test, augmented_inner_product_test, coordinate_norm_test])
@pytest.mark.parametrize("debias", [True, False])
def test_parameters_by_name_count_as_one_vector(test, debias):
    grads = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) + 1.0
    named = {"a": grads[:, :12].reshape(64, 3, 4), "b": grads[:, 12:]}
    whole, parts = test(grads, debias=debias), test(named, debias=debias)
    assert parts.required == pytest.approx(whole.required, rel=1e-5)
    assert whole.batch_size == 64 and whole.passed == (whole.required <= 64)


def test_micro_batches_tell_the_same_noise():
    grads = torch.randn(512, 40, generator=torch.Generator().manual_seed(0)) + 0.5
    means = grads.reshape(16, 32, 40).mean(1)
    single, micro = norm_test(grads), norm_test_from_microbatches(means, 32)
    assert micro.variance == pytest.approx(single.variance, rel=0.25)
    moments = norm_test_from_moments(float(means.square().sum()), float(means.mean(0).square().sum()), 16, 32)
    assert moments.required == pytest.approx(micro.required, rel=1e-4)


def test_small_and_half_precision_gradients():
    assert inner_product_test(HAND * 1e-15, debias=False).required == pytest.approx(2 / 3, rel=1e-4)
    assert norm_test(HAND.bfloat16(), debias=False).required == pytest.approx(4 / 3, rel=1e-5)
    zero = norm_test(torch.zeros(4, 2))
    assert zero.required == math.inf and not zero.passed
    assert norm_test(torch.ones(4, 2)).required == 0.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: norm_test(HAND[:1]), ValueError, "`grads` has \\[1\\] samples"),
        (lambda: norm_test({"a": HAND, "b": HAND[:3]}), ValueError, "\\[3, 4\\] samples"),
        (lambda: norm_test({"a": 3.0}), TypeError, "'a'"),
        (lambda: norm_test(HAND.long()), TypeError, "int64"),
        (lambda: norm_test(HAND, eta=0), ValueError, "`eta`"),
        (lambda: inner_product_test(HAND, theta=-1), ValueError, "`theta`"),
        (lambda: augmented_inner_product_test(HAND, nu=0), ValueError, "`nu`"),
        (lambda: norm_test_from_microbatches(HAND[:1], 4), ValueError, "samples"),
        (lambda: AdaptiveBatchSize(8, max_size=4), ValueError, "`max_size` is 4"),
        (lambda: AdaptiveBatchSize(8, max_size=9, max_growth=1.0), ValueError, "`max_growth`"),
        (lambda: AdaptiveBatchSize(8, max_size=9, test="t"), ValueError, "`test`"),
        (lambda: AdaptiveBatchSize(8, max_size=9).watch([nn.Parameter(HAND)]), ValueError, "two"),
        (lambda: AdaptiveBatchSize(8, max_size=9, test="augmented").watch([]), ValueError, "'norm'"),
        (lambda: AdaptiveBatchSampler(4, AdaptiveBatchSize(2, max_size=4), rank=1), ValueError, "`rank` is 1"),
        (lambda: AdaGradNorm([nn.Parameter(HAND)], lr=-1), ValueError, "`lr`"),
        (lambda: AdaGradNorm([nn.Parameter(HAND)], initial_accumulator=0), ValueError, "`initial_accumulator`"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_gradients_of_single_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    inputs, targets = torch.randn(5, 3), torch.randn(5, 2)

    def loss(output, target):
        return (output - target).square().sum()

    grads = per_sample_grads(model, loss, (inputs, targets))
    assert set(grads) == {"0.weight", "2.weight", "2.bias"}
    for index in range(5):
        model.zero_grad()
        loss(model(inputs[index]), targets[index]).backward()
        for name, value in grads.items():
            torch.testing.assert_close(value[index], model.get_parameter(name).grad)
    with pytest.raises(ValueError, match="batch normalisation \\(1\\)"):
        per_sample_grads(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), loss, (inputs, targets))


def test_the_size_grows_by_at_most_max_growth_and_never_shrinks():
    batch = AdaptiveBatchSize(4, max_size=20, debias=False)
    noise = torch.tensor([[1.0], [-1.0], [1.0], [-1.0 + 1e-3]])
    assert [batch.update(noise) for _ in range(4)] == [8, 16, 20, 20]
    assert batch.update(torch.ones(4, 1)) == 20
    assert len(batch.history) == 3  # none once the largest size is reached
    jump = AdaptiveBatchSize(4, max_size=20, max_growth=math.inf, debias=False)
    assert jump.update(noise) == 20
    unsure = AdaptiveBatchSize(4, max_size=100, test="coordinate", max_growth=3.0, test_interval=2)
    assert [unsure.update(noise), unsure.update(noise)] == [4, 12]
    copied = AdaptiveBatchSize(4, max_size=100)
    copied.load_state_dict(copy.deepcopy(unsure.state_dict()))
    assert copied.size == 12 and copied.history == unsure.history


def test_the_sampler_follows_the_size_and_resumes():
    batch = AdaptiveBatchSize(4, max_size=16, num_processes=2)
    samplers = [AdaptiveBatchSampler(40, batch, seed=3, rank=rank) for rank in (0, 1)]
    loaders = [DataLoader(TensorDataset(torch.arange(40)), batch_sampler=sampler) for sampler in samplers]
    seen, sizes, streams = [], [], [iter(loader) for loader in loaders]
    for first in streams[0]:
        second = next(streams[1])
        sizes.append(len(first[0]) + len(second[0]))
        seen += first[0].tolist() + second[0].tolist()
        batch.size = 16 if len(sizes) == 2 else batch.size
    assert sizes == [4, 4, 16, 16] and sorted(seen) == list(range(40))
    assert samplers[0].epoch == 1
    fresh, resumed = (AdaptiveBatchSampler(40, AdaptiveBatchSize(4, max_size=4)) for _ in range(2))
    stream = iter(fresh)
    next(stream)
    resumed.load_state_dict(fresh.state_dict())
    assert list(resumed) == list(stream)


def linear_data(count):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, inputs.sum(1, keepdim=True) + torch.randn(count, 1, generator=generator)


def accelerate_loop(accelerator, eta=1.0, count=256, micro=2, initial=8):
    """Sizes and tests of a loop that leaves all counting to accelerate and the controller."""
    torch.manual_seed(0)
    world = accelerator.num_processes
    batch = AdaptiveBatchSize(initial, max_size=64, micro_size=micro, num_processes=world, eta=eta)
    model, inputs_and_targets = nn.Linear(6, 1), linear_data(count)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    batch.watch(model.parameters())
    accelerator.gradient_accumulation_steps = batch.accumulation_steps
    sizes = []
    # whole micro-batches in the order in which a single process would take them
    for inputs, targets in DataLoader(TensorDataset(*inputs_and_targets), micro * world):
        mine = slice(accelerator.process_index * micro, (accelerator.process_index + 1) * micro)
        with accelerator.accumulate(model):
            accelerator.backward((model(inputs[mine]) - targets[mine]).square().mean())
            batch.accumulate(accelerator)
            if accelerator.sync_gradients:
                sizes.append(batch.size)
            optimizer.step()
            optimizer.zero_grad()
    return sizes, batch.history, [p.detach().clone() for p in model.parameters()]


def test_it_drives_accelerate_and_tests_what_the_gradients_are():
    accelerator = Accelerator(cpu=True)
    sizes, history, _ = accelerate_loop(accelerator)
    assert sizes[0] > 8 and sizes == sorted(sizes) and sizes[-1] > 16
    steps = [8, *sizes[:-1]]
    assert sum(steps) <= 256 and [test.batch_size for test in history] == steps[: len(history)]
    torch.manual_seed(0)
    model, (inputs, targets) = nn.Linear(6, 1), linear_data(256)
    means = []
    for start in range(0, 8, 2):
        model.zero_grad()
        (model(inputs[start : start + 2]) - targets[start : start + 2]).square().mean().backward()
        means.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = norm_test_from_microbatches(torch.stack(means), 2, eta=1.0)
    assert history[0].required == pytest.approx(expected.required, rel=1e-4)
    assert history[0].variance == pytest.approx(expected.variance, rel=1e-4)


def test_noise_is_seen_without_copies_and_hooks_go():
    parameter = nn.Parameter(torch.zeros(2))
    noise = MicrobatchNoise([parameter])
    with pytest.raises(RuntimeError, match="no gradient"):
        noise.collect()
    for gradient in ([3.0, 0.0], [1.0, 2.0]):
        (parameter * torch.tensor(gradient)).sum().backward()
    assert noise.collect(2.0) == (4 * 14.0, 16 + 4, 2)
    noise.remove()
    (parameter * 2).sum().backward()
    assert noise._sum is None
    with pytest.raises(RuntimeError, match="watch"):
        AdaptiveBatchSize(4, max_size=8).accumulate(None)


WORKER = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
import test_adaptive_batch as tests
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
sizes, history, parameters = tests.accelerate_loop(accelerator, 0.2)
figures = [sizes, [t.required for t in history], [p.tolist() for p in parameters]]
print("FIGURES", json.dumps(figures), flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    arguments = [sys.executable, "-c", textwrap.dedent(WORKER), str(Path(__file__).parent)]
    workers = [
        subprocess.Popen(
            arguments,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for rank in (0, 1)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    lines = [next(line for line in out.splitlines() if line.startswith("FIGURES")) for out, _ in outputs]
    first, second = (json.loads(line.removeprefix("FIGURES")) for line in lines)
    assert first == second  # both took the same decision
    sizes, history, parameters = accelerate_loop(Accelerator(cpu=True), 0.2)
    assert sizes[:3] == [16, 32, 64]  # doubled at every test, so alike whatever they are rounded to
    assert first[0] == sizes
    assert first[1] == pytest.approx([test.required for test in history], rel=1e-3)
    for expected, got in zip(parameters, first[2], strict=True):
        torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-5)


def descend(optimizer, x, scales, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (scales * x.square()).sum()).backward()
        optimizer.step()


def test_adagrad_norm_takes_the_written_step():
    x, y = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = AdaGradNorm([x, y], lr=0.5, initial_accumulator=4.0, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (x.sum() + 2 * y.sum()).backward()
        optimizer.step()
    expected = torch.tensor([1.0, 2.0, 2.0])
    for v in (10.0, 16.0):
        expected = expected * 0.95 - 0.5 * torch.tensor([1.0, 1.0, 2.0]) / v**0.5
    torch.testing.assert_close(torch.cat([x, y]).detach(), expected)


def test_adagrad_norm_converges_at_its_rate():
    """min ||grad||^2 = O(1/K) without noise: Ward, Wu, Bottou's theorem; on a quadratic it is far faster."""
    scales = torch.linspace(0.1, 1.0, 20)
    x = nn.Parameter(torch.ones(20))
    descend(AdaGradNorm([x], lr=3.0), x, scales, 400)
    assert float((scales * x.detach().square()).sum()) < 1e-3 * float(scales.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("foreach", [False, True])
def test_adagrad_norm_state_round_trips_bit_for_bit(foreach, dtype):
    def run(x, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            for number, part in enumerate(x):
                (
                    part * torch.randn(part.shape, generator=torch.Generator().manual_seed(step + number))
                ).sum().backward()
            optimizer.step()

    def start():
        x = [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(4, dtype=dtype))]
        groups = [{"params": [x[0]], "lr": 0.3}, {"params": [x[1]], "weight_decay": 0.1}]
        return x, AdaGradNorm(groups, lr=1.0, foreach=foreach)

    x, optimizer = start()
    run(x, optimizer, range(5))
    y, other = start()
    with torch.no_grad():
        for target, source in zip(y, x, strict=True):
            target.copy_(source)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[y[0]]["sum"], optimizer.state[x[0]]["sum"])  # float32 whatever the parameters are
    run(x, optimizer, range(5, 10))
    run(y, other, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.3 and not torch.equal(x[1], torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adagrad_norm_foreach_equals_single(dtype):
    results = []
    for foreach in (False, True):
        x = [nn.Parameter(torch.ones(5, 2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
        frozen = nn.Parameter(torch.ones(1, dtype=dtype))  # never gets a gradient
        optimizer = AdaGradNorm([frozen, *x], lr=0.7, weight_decay=0.01, foreach=foreach)
        assert optimizer.step() is None
        for _ in range(4):
            optimizer.zero_grad()
            loss = optimizer.step(lambda x=x: ((sum(p.float().pow(3).sum() for p in x)).backward(), 3.0)[1])
        assert loss == 3.0 and torch.equal(frozen, torch.ones(1, dtype=dtype))
        assert optimizer.state[frozen]["sum"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        results.append(torch.cat([p.detach().flatten() for p in x]))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], torch.ones_like(results[0]))


def test_adagrad_norm_refuses_what_it_cannot_take():
    x = nn.Parameter(torch.ones(3))
    optimizer = AdaGradNorm([x])
    x.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients; parameter 0 .* of shape \\(3,\\)"):
        optimizer.step()


def test_adagrad_norm_step_compiles():
    results = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="aot_eager")):
        x = nn.Parameter(torch.linspace(1, 2, 4))
        optimizer = AdaGradNorm([x], lr=0.5)
        step = wrap(optimizer.step)
        for _ in range(3):
            optimizer.zero_grad()
            x.square().sum().backward()
            step()
        results.append(x.detach())
    torch.testing.assert_close(*results)
