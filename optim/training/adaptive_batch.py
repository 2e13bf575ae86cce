"""A batch size that grows as fast as the gradient's noise asks for, whatever the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from trimtab.optim.checks import checked_choice, checked_count, checked_number

from .batch_criteria import (
    BatchTest,
    Gradients,
    augmented_inner_product_test,
    coordinate_norm_test,
    inner_product_test,
    norm_test,
    norm_test_from_moments,
)

__all__ = ["AdaptiveBatchSampler", "AdaptiveBatchSize", "MicrobatchNoise"]

TESTS = ("norm", "inner_product", "augmented", "coordinate")


class AdaptiveBatchSize:
    """Decides after a step how many samples the next one takes: b <- min(max_size, max(b, ceil(required))).

    The size never shrinks. Any optimizer can be used: with :class:`AdaGradNorm` and the test "norm" this is
    AdAdaGrad-Norm, with ``torch.optim.Adagrad`` and "coordinate" AdAdaGrad. The learning rate is not rescaled; a
    schedule should run over samples, not over steps. Gradients must be those before clipping.

    Three ways to use it: :meth:`update` with the gradients of single samples; :meth:`accumulate` after every
    micro-batch of an accelerate loop, whose ``gradient_accumulation_steps`` it then sets; ``size`` read by an
    :class:`AdaptiveBatchSampler`.

    Source: Lau, Liu, Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods" (arXiv 2402.11215).
    Ours: ``max_growth`` and ``debias``.

    Args:
        initial: first size >= 1, over all processes.
        max_size: >= ``initial``.
        test: "norm", "inner_product", "augmented" or "coordinate" (:mod:`.batch_criteria`); micro-batches
            take "norm".
        eta: of the norm tests, > 0.
        theta, nu: of the other two, > 0.
        test_interval: steps between two tests, >= 1.
        max_growth: > 1, the largest factor of one update, also that of a batch that cannot tell signal from noise;
            infinity follows the paper, which jumps at once.
        micro_size: samples of one micro-batch in one process; None is ``initial`` over the number of processes.
        num_processes: that share a step, >= 1.
        debias: see :func:`norm_test`.

    Attributes:
        size: samples of a step over all processes, a multiple of ``micro_size * num_processes`` where that is given.
        history: every test made.

    Raises:
        ValueError, TypeError: an argument out of range.

    Example:
        >>> batch = AdaptiveBatchSize(4, max_size=64, eta=0.5, debias=False)
        >>> batch.update(torch.tensor([[1.0], [-1.0], [3.0], [1.0]]))
        8
    """

    def __init__(
        self,
        initial: int,
        *,
        max_size: int,
        test: str = "norm",
        eta: float = 0.5,
        theta: float = 0.5,
        nu: float = 1.0,
        test_interval: int = 1,
        max_growth: float = 2.0,
        micro_size: int | None = None,
        num_processes: int = 1,
        debias: bool = True,
    ) -> None:
        self.num_processes = checked_count("num_processes", num_processes)
        initial = checked_count("initial", initial)
        self.max_size = checked_count("max_size", max_size)
        if self.max_size < initial:
            raise ValueError(f"`max_size` is {max_size}; takes one >= `initial`, {initial}")
        self.test = checked_choice("test", test, TESTS)
        self.eta = checked_number("eta", eta, above=0)
        self.theta = checked_number("theta", theta, above=0)
        self.nu = checked_number("nu", nu, above=0)
        self.test_interval = checked_count("test_interval", test_interval)
        if max_growth != math.inf:
            checked_number("max_growth", max_growth, above=1)
        self.max_growth = max_growth
        self.micro_size = None if micro_size is None else checked_count("micro_size", micro_size)
        self.debias = bool(debias)
        self.history: list[BatchTest] = []
        self.steps = 0
        self._noise: MicrobatchNoise | None = None
        self.size = self._rounded(initial)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step in each process."""
        micro = self.micro_size or max(1, self.size // self.num_processes)
        return max(1, math.ceil(self.size / (micro * self.num_processes)))

    def update(self, grads: Gradients) -> int:
        """Tests the gradients (b, ...) of single samples and gives the next size; see :func:`norm_test`."""
        self.steps += 1
        if self.steps % self.test_interval or self.size >= self.max_size:
            return self.size
        if self.test == "norm":
            result = norm_test(grads, eta=self.eta, debias=self.debias)
        elif self.test == "inner_product":
            result = inner_product_test(grads, theta=self.theta, debias=self.debias)
        elif self.test == "augmented":
            result = augmented_inner_product_test(grads, theta=self.theta, nu=self.nu, debias=self.debias)
        else:
            result = coordinate_norm_test(grads, eta=self.eta, debias=self.debias)
        return self._take(result)

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Follows the gradients of micro-batches that reach these parameters; needed before :meth:`accumulate`.

        Raises:
            ValueError: the test is not "norm", or a step could have a single micro-batch and so no variance.
        """
        if self.test != "norm":
            raise ValueError(f"`test` is {self.test!r}; micro-batches take 'norm'")
        if self.accumulation_steps * self.num_processes < 2:
            raise ValueError(
                f"`micro_size` is {self.micro_size} and `initial` {self.size} in {self.num_processes} processes: one "
                "micro-batch a step; takes at least two"
            )
        self._noise = MicrobatchNoise(parameters)

    def accumulate(self, accelerator: Any) -> int:
        """After every ``accelerator.backward``: tests once gradients are synchronized, and sets the next step's length.

        Args:
            accelerator: an ``accelerate.Accelerator``; its ``gradient_accumulation_steps`` is set when the size grows,
                and its count of micro-batches restarts, so that the next step has all of its own.

        Returns:
            The size of the next step.

        Raises:
            RuntimeError: :meth:`watch` was not called.
        """
        if self._noise is None:
            raise RuntimeError("`watch` the parameters before `accumulate`")
        if not accelerator.sync_gradients:
            return self.size
        scale = accelerator.gradient_accumulation_steps
        scaler = getattr(accelerator, "scaler", None)
        unscaled = scale / float(scaler.get_scale()) if scaler is not None else float(scale)
        squares, mean_square, count = self._noise.collect(unscaled, accelerator.num_processes)
        self.steps += 1
        if self.steps % self.test_interval == 0 and self.size < self.max_size and count >= 2:
            micro = self.micro_size or self.size // (self.num_processes * self.accumulation_steps)
            test = norm_test_from_moments(squares, mean_square, count, micro, eta=self.eta, debias=self.debias)
            self._take(test)
        if accelerator.gradient_accumulation_steps != self.accumulation_steps:
            accelerator.gradient_accumulation_steps = self.accumulation_steps
            accelerator.step = 0
        return self.size

    def state_dict(self) -> dict[str, Any]:
        """The size, the number of steps and all tests, as plain numbers."""
        return {"size": self.size, "steps": self.steps, "history": [asdict(test) for test in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.size, self.steps = int(state["size"]), int(state["steps"])
        self.history = [BatchTest(**test) for test in state["history"]]

    def _take(self, test: BatchTest) -> int:
        self.history.append(test)
        limit = self.size * self.max_growth
        wanted = min(max(self.size, test.required), limit, self.max_size)
        if math.isinf(test.required) and math.isinf(limit):
            wanted = self.max_size
        self.size = self._rounded(math.ceil(wanted))
        return self.size

    def _rounded(self, size: int) -> int:
        if self.micro_size is None:
            return size
        unit = self.micro_size * self.num_processes
        return unit * math.ceil(size / unit)


class MicrobatchNoise:
    """Sums the squared norms of micro-batches' gradients as they arrive: one number, no copy of a gradient.

    A hook on each parameter sees what one backward adds to its gradient, before processes are averaged.

    Args:
        parameters: those with ``requires_grad`` are followed, each used in one backward of a micro-batch.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError("`parameters` has none that requires a gradient; takes at least one")
        self._sum: Tensor | None = None
        self._count = 0
        self._handles = [p.register_hook(self._add) for p in self._parameters]
        self._handles.append(self._parameters[0].register_post_accumulate_grad_hook(self._seen))

    def _add(self, gradient: Tensor) -> None:
        square = gradient.detach().float().square().sum()
        self._sum = square if self._sum is None else self._sum + square.to(self._sum.device)

    def _seen(self, parameter: Tensor) -> None:
        self._count += 1

    def collect(self, scale: float = 1.0, num_processes: int = 1) -> tuple[float, float, int]:
        """What was seen since the last call.

        Args:
            scale: by which each backward's gradient was divided.
            num_processes: above 1 the sums of all are added by ``torch.distributed``.

        Returns:
            Sum of ||m_k||^2 over micro-batches, ||mean||^2 of the accumulated gradient, and how many micro-batches.
        """
        if self._sum is None:
            raise RuntimeError("no gradient has arrived since the last call")
        totals = torch.stack([self._sum, torch.full_like(self._sum, self._count)]).double()
        own = self._count
        if num_processes > 1:
            torch.distributed.all_reduce(totals)
        norms = [p.grad.float().norm() for p in self._parameters if p.grad is not None]
        # the gradient is the sum of own micro-batches over `scale`; after averaging, the mean times own / scale
        mean_square = float(torch.stack(norms).square().sum()) * (scale / own) ** 2
        self._sum, self._count = None, 0
        return float(totals[0]) * scale**2, mean_square, int(totals[1])

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


class AdaptiveBatchSampler(Sampler[list[int]]):
    """Batches of indices for a DataLoader (``batch_sampler=``) whose size follows a controller.

    Each process gets its own share of every batch, so the loader is not to be sharded again (``accelerator.prepare``
    is not needed: move the batch to ``accelerator.device``). Loader workers fetch ahead, so with ``num_workers > 0`` a
    new size comes a few batches late.

    Args:
        length: samples of the data set.
        controller: whose ``size`` is read as each batch is drawn.
        seed: of the order, another one in each epoch; None goes through the data in its own order.
        rank: of this process; its number of processes is the controller's.

    Raises:
        ValueError, TypeError: an argument out of range.
    """

    def __init__(self, length: int, controller: AdaptiveBatchSize, *, seed: int | None = 0, rank: int = 0) -> None:
        self.length = checked_count("length", length)
        self.controller = controller
        self.seed = seed
        self.rank = checked_count("rank", rank, 0)
        if self.rank >= controller.num_processes:
            raise ValueError(f"`rank` is {rank}; takes one below the controller's {controller.num_processes} processes")
        self.epoch, self.position = 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.length))
        if self.seed is not None:
            order = torch.randperm(
                self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch)
            ).tolist()
        world = self.controller.num_processes
        while self.position < self.length:
            size = self.controller.size
            part = order[self.position : self.position + size]
            if len(part) < world:  # a process would be left without a sample
                break
            self.position += len(part)
            yield part[self.rank :: world]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch and the place in it."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from :meth:`state_dict`: the next iteration starts at that place."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
