"""Unbiased gradients of programs that draw at random: a strategy for each choice, one surrogate for the whole."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, Poisson

from trimtab.optim.checks import checked_choice, checked_count, checked_generator

__all__ = ["Estimate", "current_run", "estimate", "row_sum"]

STRATEGIES = ("auto", "reparam", "reinforce", "enum", "mvd")
MOST_RUNS, AUTO_SUPPORT = 4096, 16


@dataclass(frozen=True)
class Estimate:
    """What a program's samples say of its expectation.

    Attributes:
        value: the mean, 0-d, without history.
        surrogate: 0-d; its gradient is an unbiased estimate of the expectation's gradient.
        per_sample: (S,), without history.
    """

    value: Tensor
    surrogate: Tensor
    per_sample: Tensor


@dataclass
class _Choice:
    """What one site did, so that a later run does it again: a value, or the generator's state before a draw."""

    strategy: str
    tag: str
    payload: Any
    before: Tensor
    after: Tensor


@dataclass
class _Run:
    """One run of a program: choices that are prescribed, and what the others added."""

    plan: list[_Choice]
    rows: int | None
    generator: torch.Generator
    differentiable: bool
    override: dict[str, str]
    branches: list[list[_Choice]]
    place: int = 0
    weight: Tensor | float = 1.0
    scores: list[tuple[Tensor, Any]] = field(default_factory=list)

    def choose(self, dist: Distribution, strategy: str, name: str | None, baseline: Any) -> Tensor:
        """The value of the site that comes next."""
        if self.rows is not None and tuple(dist.batch_shape[:1]) != (self.rows,):
            dist = dist.expand((self.rows, *dist.batch_shape))
        if self.place == len(self.plan):
            options = self._options(dist, self._strategy(dist, strategy, name), name)
            self.branches += [[*self.plan, other] for other in options[1:]]
            self.plan = [*self.plan, options[0]]
        choice = self.plan[self.place]
        self.place += 1
        if choice.strategy == "reparam":
            self.generator.set_state(choice.before)
            return _draw(dist, self.generator, reparametrized=True)
        self.generator.set_state(choice.after)
        if choice.strategy == "reinforce":
            self.scores.append((row_sum(dist.log_prob(choice.payload), self.rows), baseline))
        elif choice.strategy == "enum":
            self.weight = self.weight * row_sum(dist.log_prob(choice.payload), self.rows).exp()
        else:
            self.weight = self.weight * _measure_weight(dist, choice, self.rows)
        return choice.payload

    def _strategy(self, dist: Distribution, strategy: str, name: str | None) -> str:
        checked_choice("strategy", strategy, STRATEGIES)
        if strategy == "auto":
            small = _base(dist).has_enumerate_support and len(_supports(dist, self.rows, AUTO_SUPPORT)) > 0
            able = dist.has_rsample and self.differentiable
            strategy = "enum" if small else "reparam" if able else "reinforce"
        strategy = self.override.get(strategy, strategy)
        kind, where = type(dist).__name__, f"the site {name!r}" if name else f"site {self.place}"
        if strategy == "reparam" and not dist.has_rsample:
            raise ValueError(f"`strategy` is 'reparam' at {where}, {kind}, which has no rsample; takes 'reinforce'")
        if strategy == "enum" and not _base(dist).has_enumerate_support:
            raise ValueError(f"`strategy` is 'enum' at {where}, {kind}, whose support is not finite")
        if strategy == "mvd":
            elements = dist.batch_shape.numel() * dist.event_shape.numel() // (self.rows or 1)
            if not isinstance(dist, (Bernoulli, Normal, Poisson)) or elements != 1:
                raise ValueError(
                    f"`strategy` is 'mvd' at {where}, {kind}; takes one Bernoulli, Normal or Poisson number"
                )
        return strategy

    def _options(self, dist: Distribution, strategy: str, name: str | None) -> list[_Choice]:
        """The choice of this run, then those of the further runs that the strategy needs."""
        before = self.generator.get_state()
        if strategy == "enum":
            values = _supports(dist, self.rows, MOST_RUNS)
            if not values:
                raise ValueError(f"`strategy` is 'enum' at the site {name!r} of more than {MOST_RUNS} joint values")
            return [_Choice("enum", "", value, before, before) for value in values]
        if strategy == "reparam":  # drawn with its gradient, by the state
            return [_Choice("reparam", "", None, before, before)]
        with torch.no_grad():
            value = _draw(dist, self.generator, reparametrized=False)
            extra = _measure_points(dist, value, self.generator) if strategy == "mvd" else {}
        after = self.generator.get_state()
        tags = [_Choice(strategy, tag, point, before, after) for tag, point in extra.items()]
        return [_Choice(strategy, "", value, before, after), *tags]


_RUNS: list[_Run] = []


def current_run() -> _Run:
    """The run that is under way; raises RuntimeError outside of one."""
    if not _RUNS:
        raise RuntimeError("sample() is called outside of a program; takes a program run by estimate()")
    return _RUNS[-1]


def estimate(
    program: Callable[..., Tensor],
    *args: Any,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    vectorized: bool = False,
    differentiable: bool = True,
    override: dict[str, str] | None = None,
) -> Estimate:
    """The expectation of what a program returns, and a surrogate whose gradient is unbiased for the expectation's.

    Each site has its strategy, and strategies mix freely (Becker et al., "Probabilistic Programming with Programmable
    Variational Inference", arXiv 2406.15742, its translation ADEV, here for reverse mode). With value v, weight w
    from enumerations and measure-valued sites, and log-probabilities s of score-function sites with baselines b,

        surrogate = sum over runs of  w v + stop(w) sum_sites (stop(v) - b) (s - stop(s))

    Enumeration and measure-valued derivatives run the program again with the choices before replayed, by value or by
    the generator's state, and the same noise after. A value of "reparam" must not reach a comparison, a rounding or
    a branch: its gradient would be silently wrong there (`check_reparam`); the other strategies may.

    Args:
        program: calls `sample`, and returns a 0-d tensor, or (S,) if `vectorized`. It must make the same choices in
            the same order when its choices come out the same: no dropout, no other randomness.
        args: of the program.
        num_samples: S >= 1. Score-function sites without a baseline of their own have the other samples' mean.
        generator: of all draws; None is seed 0 on the CPU.
        vectorized: one run for all samples: sites draw (S, ...), and the rows of the result belong to them. A
            distribution whose first batch dimension is S counts as expanded already.
        differentiable: whether "auto" may reparametrize.
        override: strategies in place of others, such as {"reparam": "reinforce"}.

    Returns:
        Value, surrogate and samples.

    Raises:
        ValueError: a strategy that its site doesn't take, more than 4096 runs, a result of another shape.
        RuntimeError: a value that is not finite.

    Example:
        >>> from torch.distributions import Normal
        >>> from trimtab.optim import sample
        >>> mu = torch.tensor(0.5, requires_grad=True)
        >>> found = estimate(lambda: (sample(Normal(mu, 1.0), strategy="mvd") > 0).float(), num_samples=4000)
        >>> found.surrogate.backward()
        >>> abs(float(mu.grad) - 0.3521) < 0.02
        True
    """
    checked_count("num_samples", num_samples)
    generator = checked_generator(generator)
    options = (generator, differentiable, dict(override or {}))
    if vectorized:
        leaves = _leaves(program, args, num_samples, *options)
        values = [torch.as_tensor(v).expand(num_samples) for v, _, _ in leaves]
        samples = [list(zip(values, [w for _, w, _ in leaves], [s for _, _, s in leaves], strict=True))]
    else:
        samples = [_leaves(program, args, None, *options) for _ in range(num_samples)]
    direct = [sum(w * v for v, w, _ in leaves) for leaves in samples]
    joined = direct[0] if vectorized else torch.stack([torch.as_tensor(value) for value in direct])
    per_sample = joined.detach()
    if not bool(torch.isfinite(per_sample).all()):
        raise RuntimeError("the program's value is not finite")
    others = (per_sample.sum() - per_sample) / max(num_samples - 1, 1)  # 0 with one sample
    rows = [others] if vectorized else list(others)
    score = sum(
        (_stopped(w) * (v.detach() - _baseline(b, other, num_samples)) * (s - s.detach())).sum()
        for leaves, other in zip(samples, rows, strict=True)
        for v, w, scores in leaves
        for s, b in scores
    )
    surrogate = joined.mean() + score / num_samples
    return Estimate(per_sample.mean(), surrogate, per_sample)


def _leaves(
    program: Callable[..., Tensor], args: Any, rows: int | None, generator: torch.Generator, *options: Any
) -> list[tuple[Tensor, Any, list[tuple[Tensor, Any]]]]:
    """Value, weight and scores of each run that one sample needs."""
    # A stream for each sample: runs of one may go on longer than another's, and samples are to be independent.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    generator = torch.Generator(generator.device).manual_seed(seed)
    pending: list[list[_Choice]] = [[]]
    leaves = []
    while pending:
        if len(leaves) + len(pending) > MOST_RUNS:
            raise ValueError(
                f"the program's enumerated sites need more than {MOST_RUNS} runs; takes fewer joint values"
            )
        run = _Run(pending.pop(), rows, generator, *options, branches=[])
        _RUNS.append(run)
        try:
            value = program(*args)
        finally:
            _RUNS.pop()
        shapes = ((),) if rows is None else ((), (rows,))
        if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`program` gives {got}; takes one that gives a tensor of shape {shapes[-1]}")
        pending += run.branches
        leaves.append((value, run.weight, run.scores))
    return leaves


def _baseline(given: Any, others: Tensor, count: int) -> Any:
    if isinstance(given, str):
        if given != "leave_one_out":
            raise ValueError(f"`baseline` is {given!r}; takes a number, a tensor, None or 'leave_one_out'")
        if count < 2:
            raise ValueError("`baseline` is 'leave_one_out' with one sample; takes num_samples >= 2")
        return others
    return others if given is None else given.detach() if isinstance(given, Tensor) else float(given)


def _stopped(weight: Any) -> Any:
    return weight.detach() if isinstance(weight, Tensor) else weight


def row_sum(values: Tensor, rows: int | None) -> Tensor:
    """The sum of all, or of each row's."""
    return values.sum() if rows is None else values.reshape(rows, -1).sum(1)


def _draw(dist: Distribution, generator: torch.Generator, *, reparametrized: bool) -> Tensor:
    with _drawing_from(generator):
        return dist.rsample() if reparametrized else dist.sample()


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """torch.distributions take no generator: the global one has this one's state inside, and its own again after."""
    on_cuda = generator.device.type == "cuda"
    get = (lambda: torch.cuda.get_rng_state(generator.device)) if on_cuda else torch.get_rng_state
    put = (lambda state: torch.cuda.set_rng_state(state, generator.device)) if on_cuda else torch.set_rng_state
    kept = get()
    put(generator.get_state())
    try:
        yield
        generator.set_state(get())
    finally:
        put(kept)


def _base(dist: Distribution) -> Distribution:
    while isinstance(dist, Independent):
        dist = dist.base_dist
    return dist


def _supports(dist: Distribution, rows: int | None, most: int) -> list[Tensor]:
    """All joint values of a site; none where there are more than `most`."""
    base = _base(dist)
    single = base.enumerate_support(expand=False)
    shape = base.batch_shape
    single = single.reshape(len(single), *base.event_shape)
    elements = (shape if rows is None else shape[1:]).numel()
    if len(single) ** elements > most:
        return []
    found = []
    for places in itertools.product(range(len(single)), repeat=elements):
        value = single[list(places)].reshape((*(shape if rows is None else shape[1:]), *base.event_shape))
        found.append(value if rows is None else value.expand(rows, *value.shape))
    return found


def _measure_points(dist: Distribution, value: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Where the continuation is needed besides the value drawn, by the part of the derivative it is for."""
    if isinstance(dist, Bernoulli):
        return {"flip": 1 - value}
    if isinstance(dist, Poisson):
        return {"next": value + 1}
    uniform = torch.rand(value.shape, generator=generator, dtype=value.dtype, device=value.device)
    rayleigh = (-2 * torch.log1p(-uniform)).sqrt()
    normals = torch.randn(4, *value.shape, generator=generator, dtype=value.dtype, device=value.device)
    maxwell = normals[:3].square().sum(0).sqrt() * normals[0].sign()
    return {
        "mean+": dist.loc + dist.scale * rayleigh,
        "mean-": dist.loc - dist.scale * rayleigh,
        "scale+": dist.loc + dist.scale * maxwell,
        "scale-": dist.loc + dist.scale * normals[3],
    }


def _measure_weight(dist: Distribution, choice: _Choice, rows: int | None) -> Tensor:
    """1 or 0 in value, with the parameter's derivative for a gradient."""

    def change(parameter: Tensor) -> Tensor:
        return row_sum(parameter - parameter.detach(), rows)

    value = row_sum(choice.payload, rows)
    if isinstance(dist, Bernoulli):
        return (choice.tag == "") + (2 * value - 1) * change(dist.probs)
    if isinstance(dist, Poisson):
        return change(dist.rate) if choice.tag else 1 - change(dist.rate)
    scale = row_sum(dist.scale.detach(), rows)
    if choice.tag.startswith("mean"):
        return (1 if choice.tag[-1] == "+" else -1) * change(dist.loc) / (scale * math.sqrt(2 * math.pi))
    if choice.tag.startswith("scale"):
        return (1 if choice.tag[-1] == "+" else -1) * change(dist.scale) / scale
    return torch.ones_like(scale)
