"""What a program may say: draw, observe, weigh; and what others may ask of a program: a run, a density."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from trimtab.optim.checks import checked_count, checked_generator

from .estimator import _RUNS, current_run, estimate, row_sum

__all__ = ["check_reparam", "log_density", "observe", "sample", "simulate"]


@dataclass
class _Trace:
    """A program run by another: its named choices and the logarithm of its density."""

    given: Mapping[str, Tensor] | None
    path_derivative: bool = False
    choices: dict[str, Tensor] = field(default_factory=dict)
    log_prob: Tensor | float = 0.0


_TRACES: list[_Trace] = []


def sample(dist: Distribution, *, strategy: str = "auto", name: str | None = None, baseline: Any = None) -> Tensor:
    """A random choice; legal inside a program that `estimate` runs.

    Args:
        dist: of torch.distributions.
        strategy: of its gradient. "reparam": dist.rsample, for smooth continuations; "reinforce": the score function,
            for any; "enum": all values of a finite support, exact; "mvd": measure-valued, for one Bernoulli, Normal
            or Poisson number and any continuation; "auto": "enum" up to 16 joint values, else "reparam" where there
            is an rsample and the program is differentiable, else "reinforce".
        name: by which `simulate` and `log_density` know it.
        baseline: of "reinforce": a number or a tensor that doesn't depend on the choice, detached; None is
            "leave_one_out" with several samples and 0 with one.

    Returns:
        Of the distribution's shape; with a leading S in a vectorized program.

    Raises:
        ValueError: a strategy that the distribution doesn't take, a name used twice or, in `log_density`, missing.
        RuntimeError: outside of a program.
    """
    trace = _TRACES[-1] if _TRACES else None
    if trace is None:
        return current_run().choose(dist, strategy, name, baseline)
    if name is None:
        raise ValueError("`name` is None; takes a name at each site of a program with a density")
    if name in trace.choices:
        raise ValueError(f"`name` is {name!r} at two sites; takes another name for each")
    if trace.given is not None:
        if name not in trace.given:
            raise ValueError(f"`choices` has no {name!r}; takes one for each site of the program")
        value, density = trace.given[name], dist
    else:
        run = current_run()
        value = run.choose(dist, strategy, name, baseline)
        reparametrized = run.plan[run.place - 1].strategy == "reparam"
        density = detached(dist) if trace.path_derivative and reparametrized else dist
    trace.choices[name] = value
    trace.log_prob = trace.log_prob + row_sum(density.log_prob(value), _rows())
    return value


def observe(dist: Distribution, value: Tensor) -> None:
    """Multiplies a model's density by that of data; legal in a program whose density is taken.

    Args:
        dist: of torch.distributions.
        value: the data.

    Raises:
        RuntimeError: outside of `log_density` and `simulate`.
    """
    if not _TRACES:
        raise RuntimeError("observe() is called outside of a program whose density is taken")
    log_prob = dist.log_prob(value)
    if _rows() is not None and tuple(log_prob.shape[:1]) != (_rows(),):
        log_prob = log_prob.expand(_rows(), *log_prob.shape)
    _TRACES[-1].log_prob = _TRACES[-1].log_prob + row_sum(log_prob, _rows())


def simulate(
    program: Callable[..., Any], *args: Any, path_derivative: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Runs a program inside another: its choices by name, and the log-density of all it drew (and observed).

    Args:
        program: names each of its sites.
        args: of the program.
        path_derivative: the log-density's own parameters are constants at reparametrized sites ("sticking the
            landing", Roeder et al., arXiv 1703.09194): the score, of expectation 0, is left out.

    Returns:
        Choices and log-density, 0-d or (S,).
    """
    current_run()
    trace = _traced(_Trace(None, path_derivative), program, args)
    return trace.choices, torch.as_tensor(trace.log_prob)


def log_density(program: Callable[..., Any], choices: Mapping[str, Tensor], *args: Any) -> Tensor:
    """The log-density of a program at given choices, times what it observed.

    Args:
        program: names each of its sites.
        choices: a value for each.
        args: of the program.

    Returns:
        0-d or (S,).

    Raises:
        ValueError: a choice is missing, or one is left over.
    """
    trace = _traced(_Trace(dict(choices)), program, args)
    left = set(choices) - set(trace.choices)
    if left:
        raise ValueError(f"`choices` has {sorted(left)}, which the program doesn't draw")
    return torch.as_tensor(trace.log_prob)


def detached(dist: Distribution) -> Distribution:
    """The distribution with constants for parameters; raises ValueError where that can't be done."""
    if isinstance(dist, Independent):
        return Independent(detached(dist.base_dist), dist.reinterpreted_batch_ndims)
    given = {name: getattr(dist, name) for name in dist.arg_constraints if name in vars(dist)}
    if not given:
        raise ValueError(f"`path_derivative` is True with {type(dist).__name__}; takes False")
    return type(dist)(**{name: value.detach() for name, value in given.items()})


def check_reparam(
    program: Callable[..., Tensor],
    *args: Any,
    params: Sequence[Tensor],
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> float:
    """Compares the gradients of reparametrized choices with those of score functions in their place.

    Args:
        program: as in `estimate`.
        args: of the program.
        params: whose gradients are compared.
        num_samples: of each, >= 2.
        generator: of the draws.

    Returns:
        The largest difference, in standard errors.

    Warns:
        UserWarning: above 5: a reparametrized value reaches something that is not smooth; use "reinforce" there.
    """
    checked_count("num_samples", num_samples, 2)
    generator = checked_generator(generator)
    found = []
    for override in ({}, {"reparam": "reinforce"}):
        rows = []
        for _ in range(num_samples):
            surrogate = estimate(program, *args, generator=generator, override=override).surrogate
            flat = torch.autograd.grad(surrogate, params, allow_unused=True, materialize_grads=True) \
                if surrogate.requires_grad else [torch.zeros_like(p) for p in params]  # fmt: skip
            rows.append(torch.cat([g.flatten() for g in flat]).double())
        found.append(torch.stack(rows))
    spread = sum(g.var(0) for g in found).sqrt() / num_samples**0.5
    z = float(((found[0].mean(0) - found[1].mean(0)).abs() / spread.clamp(min=1e-12)).max())
    if z > 5:
        warnings.warn(
            f"reparametrized gradients are {z:.1f} standard errors from score-function ones: "
            "a choice reaches something that is not smooth; use strategy='reinforce' there",
            stacklevel=2,
        )
    return z


def _rows() -> int | None:
    return _RUNS[-1].rows if _RUNS else None


def _traced(trace: _Trace, program: Callable[..., Any], args: Any) -> _Trace:
    _TRACES.append(trace)
    try:
        program(*args)
    finally:
        _TRACES.pop()
    return trace
