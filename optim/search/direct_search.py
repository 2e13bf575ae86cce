"""Covering direct search: an incumbent that moves when a trial near it is better, whatever the function is like."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number, checked_point

from .polling import DirectSearchResult, checked_radii, poll_direction
from .sampling import normal_like

__all__ = ["DirectSearch"]

LARGEST = 5000
"""Unknowns that polling takes: a failed round has as many evaluations."""


class DirectSearch:
    """The incumbent, asked for one trial at a time and told what it is worth; larger is better.

    A round is an attack where one is given, and, unless that brought a sufficient gain: a covering step, one point of
    the ball of radius `r0` about the incumbent; a search step, one random direction of length r0 sqrt(j) at the j-th;
    and a poll of the directions of a random Householder matrix at the polling radius. The round ends at its first
    success. The radius doubles after a success of search or poll and halves when all directions fail. The covering
    step is what reaches a solution of a discontinuous function; it goes on when the radius is at its floor.

    Source: Bouchet, Vidal, "Optimization by Directional Attacks" (arXiv 2510.01461); the covering step is that of
    Audet, Bouchet, Bourdin (arXiv 2401.07097). The number of failed attacks before the direct search begins and the
    barrier "two-phase" are ours.

    Args:
        x0: where to start, of any shape.
        retract: applied to each trial, such as a projection on a sphere.
        barrier: what constraints c <= 0 mean. "extreme": an infeasible trial is never taken, and the start is feasible.
            "two-phase": among infeasible points the least sum of violations is best, and any feasible one is better.
            "quadratic": the objective loses `penalty` times the sum of squared violations.
        penalty: > 0.
        r0: radius at the start and of the covering step.
        r_dsm: least and largest polling radius.
        r_atk: least and largest radius of attacks.
        poll: "2n" directions or "n+1".
        covering: "random", or "farthest" of 64 random points from all trials so far.
        sufficient: relative gain of an attack that ends its round.
        dsm_after: attacks without it, one after the other, before the direct search begins.
        attack: (x, radius) -> d, shaped as x; None has no attacks.
        direct: False has attacks alone.
        generator: of the directions; None is seed 0.

    Attributes:
        x: the incumbent.
        value: the objective there, NaN before the first `tell`.

    Raises:
        ValueError: a number out of range, or more than 5000 unknowns with the direct search on.
        TypeError: something of another type.

    Example:
        >>> search = DirectSearch(torch.tensor([2.0, -1.0]))
        >>> for _ in range(300):
        ...     search.tell(-float(search.ask().square().sum()))
        >>> search.value > -1e-4
        True
    """

    def __init__(
        self,
        x0: Tensor,
        *,
        retract: Callable[[Tensor], Tensor] | None = None,
        barrier: Literal["extreme", "two-phase", "quadratic"] = "extreme",
        penalty: float = 1.0,
        r0: float = 1.0,
        r_dsm: tuple[float, float] = (1e-5, 10.0),
        r_atk: tuple[float, float] = (1e-5, 1.0),
        poll: Literal["2n", "n+1"] = "2n",
        covering: Literal["random", "farthest"] = "random",
        sufficient: float = 1e-3,
        dsm_after: int = 8,
        attack: Callable[[Tensor, float], Tensor] | None = None,
        direct: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        self.x = checked_point("x0", x0).clone()
        if direct and self.x.numel() > LARGEST:
            raise ValueError(
                f"`x0` has {self.x.numel()} elements; direct search takes at most {LARGEST}: give a code of fewer, or "
                "set `direct=False` for attacks alone"
            )
        if not direct and attack is None:
            raise ValueError("`direct` is False and there is no attack; takes one of the two")
        self.retract = retract
        self.barrier = checked_choice("barrier", barrier, ("extreme", "two-phase", "quadratic"))
        self.penalty = checked_number("penalty", penalty, above=0)
        self.poll = checked_choice("poll", poll, ("2n", "n+1"))
        self.covering = checked_choice("covering", covering, ("random", "farthest"))
        self.r_dsm_range, self.r_atk_range = checked_radii("r_dsm", r_dsm, r0), checked_radii("r_atk", r_atk, r0)
        self.r0 = float(r0)
        self.r_dsm, self.r_atk = (min(self.r0, high) for _, high in (self.r_dsm_range, self.r_atk_range))
        self.sufficient = checked_number("sufficient", sufficient, least=0)
        self.dsm_after = checked_count("dsm_after", dsm_after, 0)
        self.attack, self.direct = attack, direct
        self.generator = checked_generator(generator)
        self.value, self.score = math.nan, (-2, -math.inf)
        self.best_feasible: tuple[Tensor, float] | None = None
        self.evaluations = self.failed_attacks = self.searches = 0
        self.trace: list[tuple[int, float, str]] = []
        self.phase = "start"
        self._direction, self._mirror = 0, torch.zeros_like(self.x)
        self._trial: Tensor | None = None
        self._seen: list[Tensor] = []

    def ask(self) -> Tensor:
        """The trial whose value is wanted next; the same until `tell`."""
        while self._trial is None:
            step = self._step()
            if self.phase == "attack" and not bool((step != 0).any()):
                self._attack_failed()  # stationary: no evaluation is spent on it
                if not self.direct and self.r_atk <= self.r_atk_range[0]:
                    break
                continue
            trial = self.x + step
            self._trial = trial if self.retract is None else self.retract(trial)
        return self.x.clone() if self._trial is None else self._trial.clone()

    @property
    def finished(self) -> bool:
        """Whether attacks alone are at their least radius: nothing further will be found."""
        return not self.direct and self.phase == "attack" and self.r_atk <= self.r_atk_range[0]

    def tell(self, value: float, constraints: Tensor | None = None) -> None:
        """Takes what the trial is worth.

        Args:
            value: of the objective; a trial where it is not finite is never taken.
            constraints: (p,), feasible where all are <= 0; None has none.

        Raises:
            ValueError: under the extreme barrier if the start is infeasible, and if its value is not finite.
            RuntimeError: without a preceding `ask`.
        """
        if self._trial is None and not self.finished:
            raise RuntimeError("`tell` takes the value of what `ask` gave; call `ask` first")
        trial, self._trial = self._trial if self._trial is not None else self.x.clone(), None
        self.evaluations += 1
        score, violation = self._scored(float(value), constraints)
        if self.covering == "farthest":
            self._seen.append(trial)
        if violation <= 0 and score[0] == 0 and (self.best_feasible is None or value > self.best_feasible[1]):
            self.best_feasible = (trial, float(value))
        if self.phase == "start":
            if score[0] == -2 or (score[0] == -1 and self.barrier == "extreme"):
                what = "infeasible" if score[0] == -1 else "a point without a finite value"
                raise ValueError(f"`x0` is {what}; takes a feasible start, or barrier='two-phase' or 'quadratic'")
            self._move(trial, float(value), score)
            self._end_round()
            return
        better = score > self.score and math.isfinite(score[1])
        gain = math.inf
        if score[0] == self.score[0]:
            gain = (score[1] - self.score[1]) / (abs(self.score[1]) + 1e-10)
        if better:
            self._move(trial, float(value), score)
        getattr(self, f"_after_{self.phase}")(better, gain)

    def _scored(self, value: float, constraints: Tensor | None) -> tuple[tuple[int, float], float]:
        excess = torch.zeros(1) if constraints is None else constraints.detach().double().flatten().clamp_min(0).cpu()
        violation = float(excess.sum())
        if not (math.isfinite(value) and math.isfinite(violation)):
            return (-2, -math.inf), math.inf
        if self.barrier == "quadratic":
            return (0, value - self.penalty * float(excess.square().sum())), violation
        if violation > 0:
            return (-1, -math.inf if self.barrier == "extreme" else -violation), violation
        return (0, value), violation

    def _move(self, x: Tensor, value: float, score: tuple[int, float]) -> None:
        self.x, self.value, self.score = x, value, score
        self.trace.append((self.evaluations, value, self.phase))

    def _end_round(self) -> None:
        self.phase = "covering" if self.attack is None else "attack"

    def _step(self) -> Tensor:
        if self.phase == "start":
            return torch.zeros_like(self.x)
        if self.phase == "attack":
            return self.attack(self.x, self.r_atk)
        if self.phase == "covering":
            return self._covering_step()
        if self.phase == "search":
            u = normal_like(self.x, self.generator)
            return min(self.r_dsm_range[1], self.r0 * math.sqrt(self.searches + 1)) * u / u.abs().max()
        return self.r_dsm * poll_direction(self._mirror, self._direction)

    def _covering_step(self) -> Tensor:
        count = 64 if self.covering == "farthest" else 1
        shape, device = (count, *self.x.shape), self.generator.device
        points = 2 * torch.rand(shape, generator=self.generator, device=device).to(self.x.device, self.x.dtype) - 1
        points = self.r0 * points
        if count == 1:
            return points[0]
        seen = torch.stack([(point - self.x).flatten() for point in self._seen])
        return points[int(torch.cdist(points.flatten(1), seen).amin(1).argmax())]

    def _after_attack(self, better: bool, gain: float) -> None:
        low, high = self.r_atk_range
        if better and gain >= self.sufficient:
            self.r_atk, self.failed_attacks = min(1.3 * self.r_atk, high), 0
            if self.r_dsm <= self.r_dsm_range[0]:
                self.r_dsm *= 2
            return
        if better:
            self.r_atk = min(1.1 * self.r_atk, high)
            self._next_after_attack()
        else:
            self._attack_failed()

    def _attack_failed(self) -> None:
        self.r_atk = max(self.r_atk_range[0], self.r_atk / 1.3)
        self._next_after_attack()

    def _next_after_attack(self) -> None:
        self.failed_attacks += 1
        if self.direct and self.failed_attacks >= self.dsm_after:
            self.phase = "covering"

    def _after_covering(self, better: bool, gain: float) -> None:
        if better:
            self._end_round()
        else:
            self.phase = "search"

    def _after_search(self, better: bool, gain: float) -> None:
        self.searches += 1
        if better:
            self._poll_succeeded()
            return
        length = torch.zeros(())
        while not bool(length > 0):
            v = normal_like(self.x, self.generator)
            length = torch.linalg.vector_norm(v)
        self._mirror, self._direction, self.phase = v / length, 0, "poll"

    def _after_poll(self, better: bool, gain: float) -> None:
        if better:
            self._poll_succeeded()
            return
        self._direction += 1
        n = self.x.numel()
        # n + 1 directions are the rows and minus their sum, which is number 2n.
        if self.poll == "n+1" and self._direction == n:
            self._direction = 2 * n
        if self._direction == 2 * n + (self.poll == "n+1"):
            self.r_dsm = max(self.r_dsm_range[0], self.r_dsm / 2)
            self._end_round()

    def _poll_succeeded(self) -> None:
        self.r_dsm = min(2 * self.r_dsm, self.r_dsm_range[1])
        self._end_round()

    def result(self, num_gradients: int, stop_reason: str) -> DirectSearchResult:
        """What was found so far."""
        x, value = (self.x, self.value) if self.best_feasible is None else self.best_feasible
        counts = (self.best_feasible is not None, self.evaluations, num_gradients)
        return DirectSearchResult(x, value, *counts, tuple(self.trace), stop_reason)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run goes on from, generator included: tensors, numbers, lists and strings."""
        return {**{name: getattr(self, name) for name in _STATE}, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: for a point of another shape.
        """
        if state["x"].shape != self.x.shape:
            raise ValueError(f"`state` has a point of shape {tuple(state['x'].shape)}; takes {tuple(self.x.shape)}")
        for name in _STATE:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self.generator.set_state(state["generator"])


_STATE = (
    "x", "value", "score", "best_feasible", "evaluations", "failed_attacks", "searches", "trace", "phase", "r_dsm",
    "r_atk", "_direction", "_mirror", "_trial", "_seen",
)  # fmt: skip
