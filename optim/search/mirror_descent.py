"""Optimistic online mirror descent: play with the last gradient as a guess of the next one."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_number, checked_point

from .domains import Ball, Domain, Simplex

__all__ = ["OptimisticMirrorDescent"]

_STATE = ("t", "lipschitz", "gradient_variation", "centre", "total", "last", "inverse", "hint", "played", "_warned")


class OptimisticMirrorDescent:
    """Plays points of a convex set against losses that come one a round.

    With g_t the gradient at x_t and the hint M_t = g_{t-1} (M_1 = 0),

        x_t      = argmin_x <M_t, x> + D_t(x, c_t)
        c_{t+1}  = argmin_x <g_t, x> + D_t(x, c_t)

    and D_t the Bregman divergence of, with the gradient variation V_t = sum_{s <= t} ||g_s - M_s||^2,

        "convex"            ||x||^2 / (2 eta_t),  eta_t = D / sqrt(10 D^2 L^2 + 4 G^2 + V_{t-1})
        "strongly_convex"   ||x||^2 / (2 eta_t),  eta_t = 2 / (lambda t)
        "exp_concave"       x^T H_t x / 2,  H_t = (1 + beta G^2 / 2) I + beta / 2 sum_{s < t} g_s g_s^T,
                            beta = min(1 / (4 G D), alpha) / 2

    so that regret grows with the noise and the drift of the losses rather than with their number: for losses that are
    drawn anew with variance sigma_t^2 about means that drift by Sigma_t, sqrt(sum sigma_t^2) + sqrt(sum Sigma_t^2),
    its logarithm / lambda, and d / alpha times its logarithm. With independent noise alone, plain gradient descent is
    better.

    On the simplex the entropic map takes the place of the square: w_t is proportional to
    exp(-eta_t (sum_{s < t} g_s + M_t)), eta_t = sqrt(log n / (G^2 + sum_{s < t} ||g_s - M_s||_inf^2)), the usual tuning
    of optimistic Hedge.

    Source: Chen, Zhang, Tu, Zhao, Zhang, "Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial
    Online Convex Optimization" (arXiv 2302.04552).

    Args:
        domain: where x lies.
        lipschitz: G > 0, a bound of the gradients' norm (of its largest entry for the entropic map).
        smoothness: L >= 0 of the expected losses.
        rule: see above.
        strong_convexity: lambda > 0, with its rule.
        alpha: > 0, with the rule "exp_concave".
        mirror: "entropic" goes with a simplex and the rule "convex"; "auto" takes it there.
        adaptive_lipschitz: the bound grows with the gradients instead of a warning.
        step_size: eta > 0 of all rounds, in place of the rule's.
        dtype: of what is played.

    Attributes:
        t: the present round, from 1.
        gradient_variation: V.

    Raises:
        ValueError: a number out of range, a rule without its constant, "entropic" elsewhere than on a simplex.
        TypeError: if `domain` is none.

    Example:
        >>> player = OptimisticMirrorDescent(Simplex(3), lipschitz=1.0)
        >>> for _ in range(50):
        ...     w = player.predict()
        ...     player.update(torch.tensor([1.0, 0.0, 0.5]))
        >>> int(w.argmax()), round(w.sum().item(), 6)
        (1, 1.0)
    """

    def __init__(
        self,
        domain: Domain,
        *,
        lipschitz: float,
        smoothness: float = 0.0,
        rule: Literal["convex", "strongly_convex", "exp_concave"] = "convex",
        strong_convexity: float | None = None,
        alpha: float | None = None,
        mirror: Literal["auto", "euclidean", "entropic"] = "auto",
        adaptive_lipschitz: bool = False,
        step_size: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not isinstance(domain, Domain):
            raise TypeError(f"`domain` is a {type(domain).__name__}; takes a Ball, Box or Simplex")
        self.domain = domain
        self.lipschitz = checked_number("lipschitz", lipschitz, above=0)
        self.smoothness = checked_number("smoothness", smoothness, least=0)
        self.rule = checked_choice("rule", rule, ("convex", "strongly_convex", "exp_concave"))
        if rule == "strongly_convex":
            self.strong_convexity = checked_number("strong_convexity", strong_convexity, above=0)
        if rule == "exp_concave":
            self.alpha = checked_number("alpha", alpha, above=0)
            if math.prod(domain.shape) > 4096:
                raise ValueError(f"`domain` has {math.prod(domain.shape)} unknowns; 'exp_concave' takes at most 4096")
        checked_choice("mirror", mirror, ("auto", "euclidean", "entropic"))
        simplex = isinstance(domain, Simplex)
        if mirror == "entropic" and not (simplex and rule == "convex"):
            raise ValueError(f"`mirror` is 'entropic' on a {type(domain).__name__} with the rule {rule!r}; takes a "
                             "Simplex and 'convex'")  # fmt: skip
        self.entropic = mirror == "entropic" or mirror == "auto" and simplex and rule == "convex"
        self.adaptive_lipschitz = adaptive_lipschitz
        self.fixed = None if step_size is None else checked_number("step_size", step_size, above=0)
        self.t, self.gradient_variation = 1, 0.0
        self.centre = domain.start().to(dtype)
        self.total, self.last = torch.zeros_like(self.centre), torch.zeros_like(self.centre)
        self.hint, self.played = self.last, None
        self._warned = False
        self.inverse = None
        if rule == "exp_concave":
            self.beta = 0.5 * min(1 / (4 * lipschitz * domain.diameter), self.alpha)
            unknowns = self.centre.numel()
            self.inverse = torch.eye(unknowns, dtype=dtype) / (1 + self.beta / 2 * lipschitz**2)

    @property
    def step_size(self) -> float:
        """eta of this round; 1 for "exp_concave", whose H_t is the step."""
        if self.fixed is not None:
            return self.fixed
        if self.rule == "exp_concave":
            return 1.0
        if self.rule == "strongly_convex":
            return 2 / (self.strong_convexity * self.t)
        if self.entropic:
            return math.sqrt(math.log(self.centre.numel()) / (self.lipschitz**2 + self.gradient_variation))
        diameter = self.domain.diameter
        slack = 10 * (diameter * self.smoothness) ** 2 + 4 * self.lipschitz**2
        return diameter / math.sqrt(slack + self.gradient_variation)

    def predict(self, hint: Tensor | None = None) -> Tensor:
        """x_t, shaped as the domain's points.

        Args:
            hint: M_t, a guess of the gradient that will come; None is the last one.

        Raises:
            ValueError: for a hint of another shape or not finite.
        """
        self.hint = self.last if hint is None else self._checked("hint", hint)
        self.played = self._moved(self.hint)
        return self.played.clone()

    def update(self, gradient: Tensor) -> None:
        """Takes the gradient of this round's loss at the last `predict`.

        Raises:
            ValueError: for another shape, or a value that is not finite.
            RuntimeError: without a `predict` in this round.
        """
        if self.played is None:
            raise RuntimeError("`update` takes the gradient at what `predict` gave; call `predict` first")
        gradient = self._checked("gradient", gradient)
        order = float("inf") if self.entropic else 2
        length, change = torch.stack(
            [torch.linalg.vector_norm(v, order) for v in (gradient, gradient - self.hint)]
        ).tolist()
        if self.entropic:
            self.total = self.total + gradient
        else:
            self.centre = self._moved(gradient)
        if length > self.lipschitz * (1 + 1e-9):  # after both moves, whose step size is one
            self._too_long(length)
        if self.inverse is not None:  # Sherman-Morrison
            flat = gradient.flatten()
            along = self.inverse @ flat
            self.inverse = self.inverse - torch.outer(along, along) / (2 / self.beta + flat @ along)
        self.gradient_variation += change**2
        self.last, self.played = gradient, None
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        """What a player of the same settings goes on from."""
        return {name: _copied(getattr(self, name)) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: for something else, or the state of another shape.
        """
        if set(state) != set(_STATE) or state["centre"].shape != self.centre.shape:
            raise ValueError(f"`state` has {sorted(state)}; takes the state_dict of a player in such a domain")
        for name in _STATE:
            setattr(self, name, _copied(state[name]))

    def _moved(self, gradient: Tensor) -> Tensor:
        if self.entropic:
            return torch.softmax(-self.step_size * (self.total + gradient), 0)
        if self.inverse is None:
            return self.domain.project(self.centre - self.step_size * gradient)
        shape = self.centre.shape
        free = self.centre - (self.inverse @ gradient.flatten()).view(shape)
        nearest = self.domain.project(free)
        if torch.equal(nearest, free) or float((nearest - free).abs().max()) < 1e-14:
            return nearest
        return _nearest(self.domain, free, torch.linalg.inv(self.inverse))

    def _checked(self, name: str, value: Any) -> Tensor:
        value = checked_point(name, value).to(self.centre)
        if value.shape != self.centre.shape:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; takes {tuple(self.centre.shape)}")
        return value

    def _too_long(self, length: float) -> None:
        if self.adaptive_lipschitz:
            self.lipschitz = length
        elif not self._warned:
            self._warned = True
            message = f"a gradient has length {length:.3g}, above `lipschitz` {self.lipschitz:.3g}: no bound holds"
            warnings.warn(message, UserWarning, stacklevel=3)


def _nearest(domain: Domain, point: Tensor, metric: Tensor) -> Tensor:
    """The point of a domain that is nearest in ||.||_H.

    On a ball, the stationary (H + mu I)^-1 H y of the multiplier mu at which the length is the radius; elsewhere by
    accelerated projected gradient.
    """
    values, vectors = torch.linalg.eigh(metric)
    if isinstance(domain, Ball):
        centre = domain.center.to(point)
        pulled = values * (vectors.T @ (point - centre).flatten())
        low, high = 0.0, float(torch.linalg.vector_norm(pulled)) / domain.radius
        for _ in range(100):
            mu = (low + high) / 2
            inside = float(torch.linalg.vector_norm(pulled / (values + mu))) <= domain.radius
            low, high = (low, mu) if inside else (mu, high)
        return domain.project(centre + (vectors @ (pulled / (values + high))).view(point.shape))
    steepest, flattest = float(values[-1]), float(values[0])
    momentum = (math.sqrt(steepest) - math.sqrt(flattest)) / (math.sqrt(steepest) + math.sqrt(flattest))
    x = ahead = domain.project(point)
    for _ in range(10_000):
        slope = (metric @ (ahead - point).flatten()).view(point.shape)
        moved = domain.project(ahead - slope / steepest)
        step = float((moved - x).abs().max())
        x, ahead = moved, moved + momentum * (moved - x)
        if step < 1e-13:
            break
    return x


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
