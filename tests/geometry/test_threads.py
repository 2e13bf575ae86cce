"""Parts side by side give what one thread gives, and leave torch's settings alone."""

import threading

import pytest
import torch

from trimtab.geometry import SlicedTarget, sliced_wasserstein
from trimtab.geometry.threads import in_threads, num_parts


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_of_one_core_each_without_gradients(threads):
    barrier = threading.Barrier(2)

    def task(i: int) -> tuple:
        barrier.wait(10)  # both run at once, or this breaks
        return i, torch.get_num_threads(), torch.is_grad_enabled(), num_parts(100, 1 << 30)

    assert in_threads(task, [(0,), (1,)]) == [(0, 1, False, 1), (1, 1, False, 1)]
    assert torch.get_num_threads() == threads
    assert in_threads(lambda: torch.get_num_threads(), [()]) == [threads]
    assert torch.is_grad_enabled()


def test_new_threads_of_the_process_have_torchs_setting(threads):
    in_threads(abs, [(1,), (2,)])
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [threads]


def test_an_error_in_a_part_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 / n, [(1,), (0,)])


@pytest.mark.parametrize("clouds", [1, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_number_of_threads_gives_the_value_and_gradients_of_plain_torch(threads, clouds, weighted):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(clouds, 700, 3, generator=generator), torch.randn(clouds, 900, 3, generator=generator)
    theta = torch.nn.functional.normalize(torch.randn(41, 3, generator=generator), dim=-1)
    options = {"x_weights": torch.rand(clouds, 700, generator=generator)} if weighted else {}

    def found(backend: str) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, y, theta)]
        value = sliced_wasserstein(*inputs[:2], projections=inputs[2], backend=backend, **options)
        return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]

    assert num_parts(41, clouds * 41 * 700) == min(threads, clouds * 41 * 700 >> 14)
    for got, want in zip(found("numpy"), found("autograd"), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("clouds", [1, 4])
def test_a_sorted_target_is_cut_with_its_clouds(threads, clouds):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(clouds, 600, 3, generator=generator), torch.randn(clouds, 600, 3, generator=generator)
    for cloud in (y, y[0]):
        target = SlicedTarget(cloud, num_projections=64, generator=generator)
        got = sliced_wasserstein(x, target, num_projections=64)
        want = sliced_wasserstein(x, cloud.expand_as(x), projections=target.projections, backend="autograd")
        torch.testing.assert_close(got, want)


def test_inference_mode_holds_in_the_parts(threads):
    x = torch.randn(4, 2000, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = sliced_wasserstein(x, x + 1, generator=torch.Generator().manual_seed(0))
    assert inside.is_inference()
    torch.testing.assert_close(inside.clone(), sliced_wasserstein(x, x + 1, generator=torch.Generator().manual_seed(0)))
