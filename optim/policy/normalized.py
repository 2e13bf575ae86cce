"""Normalized policy gradients with implicit gradient transport, and with recursive momentum by Hessian products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_number
from trimtab.optim.training.base import TrainingOptimizer, label, state_dtype

__all__ = ["HARPG", "NormalizedPGIGT"]

SCHEDULES = ("paper", "constant")


class _Momentum(TrainingOptimizer):
    """Points, momenta and schedules that the two methods share.

    All tensors of the state are float32 at the least. A parameter of less has its point theta_t among them: a step
    below its precision would otherwise be lost, and with it theta_t - theta_{t-1}.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        checked_number("lr", defaults["lr"], above=0)
        if not 0 < checked_number("momentum", defaults["momentum"]) <= 1:
            raise ValueError(f"`momentum` is {defaults['momentum']}; takes a number in (0, 1]")
        checked_choice("schedule", defaults["schedule"], SCHEDULES)
        checked_number("eps", defaults["eps"], least=0)
        super().__init__(params, {**defaults, "step": 0})
        self._away = False

    @property
    def iteration(self) -> int:
        """t: steps taken so far."""
        return self.param_groups[0]["step"]

    def _decay(self, power: float) -> float:
        return (2 / (self.iteration + 2)) ** power if self.param_groups[0]["schedule"] == "paper" else 1.0

    def _members(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _point(self, p: Tensor) -> Tensor:
        """theta_t, its own storage."""
        return self.state[p]["point"] if "point" in self.state[p] else p.detach().clone()

    @contextlib.contextmanager
    def _at(self, combine: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Parameters at combine(theta_t, theta_{t-1}) inside, at theta_t after, whatever happens."""
        if self._away:
            raise RuntimeError(f"{type(self).__name__} is already away from its parameters; leave lookahead() first")
        kept = [(p, p.detach().clone()) for _, p in self._members()]
        self._away = True
        try:
            with torch.no_grad():
                for p, _ in kept:
                    if "previous" in self.state[p]:
                        p.copy_(combine(self._point(p), self.state[p]["previous"]))
            yield
        finally:
            with torch.no_grad():
                for p, value in kept:
                    p.copy_(value)
            self._away = False

    def _gradients(self) -> list[Tensor]:
        """What the closure left, in the direction of ascent."""
        found = []
        for group, p in self._members():
            if p.grad is not None and (p.grad.is_sparse or torch.is_complex(p)):
                number = next(i for i, other in enumerate(group["params"]) if other is p)
                raise ValueError(f"{type(self).__name__} takes dense real gradients; not of {label(group, number)}")
            gradient = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            found.append(gradient.to(state_dtype(p)) * (1 if group["maximize"] else -1))
        return found

    @torch.no_grad()
    def _move(self, momenta: list[Tensor], power: float, normalize: bool) -> None:
        """theta_{t+1} = theta_t + lr_t d / ||d||, the norm over all parameters of all groups."""
        norm = torch.stack([d.double().square().sum().cpu() for d in momenta]).sum().sqrt()
        if not bool(torch.isfinite(norm)):
            raise RuntimeError(f"{type(self).__name__}: the momentum is not finite at step {self.iteration}")
        still = float(norm) < self.param_groups[0]["eps"]
        for (group, p), d in zip(self._members(), momenta, strict=True):
            state, point = self.state[p], self._point(p)
            state["momentum"], state["previous"] = d, point.clone()
            if p.dtype != state_dtype(p):
                state["previous"] = point.to(state_dtype(p), copy=True)
                point = state["point"] = point.to(state_dtype(p))
            if not still:
                point.add_(d, alpha=group["lr"] * self._decay(power) / (float(norm) if normalize else 1.0))
            p.copy_(point)
        for group in self.param_groups:
            group["step"] += 1

    def _closure_loss(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            raise RuntimeError(f"{type(self).__name__}.step needs a closure that draws trajectories and goes backward")
        return self._loss(closure)


class NormalizedPGIGT(_Momentum):
    """N-PG-IGT: momentum of gradients at extrapolated parameters, and steps of fixed length along it.

        q_t = theta_t + (1 - eta_t) / eta_t (theta_t - theta_{t-1}),   g_t drawn with the policy of q_t
        d_t = (1 - eta_t) d_{t-1} + eta_t g_t,                         theta_{t+1} = theta_t + lr_t d_t / ||d_t||

    The extrapolation makes d_t exactly the gradient at theta_t where the objective is quadratic and the gradients have
    no noise. One batch of trajectories, one backward pass; the path doesn't depend on the rewards' scale. Schedules:
    "paper" has lr_t = lr 2/(t+2) and eta_t = momentum (2/(t+2))^(4/5), or ^(2/3) without extrapolation.

    Source: Fatkhullin, Barakat, Kireeva, He, "Stochastic Policy Gradient Methods: Improved Sample Complexity for
    Fisher-non-degenerate Policies" (arXiv 2302.01734), algorithm N-PG-IGT; ||d|| is over all parameters at once.

    Args:
        params: parameters or groups, of any floating dtype.
        lr: gamma_0 > 0: the length of the first step; groups may have their own.
        momentum: eta_0, in (0, 1].
        schedule: "paper" or "constant".
        normalize: False takes lr_t d_t as the step.
        eps: below this norm of d the parameters stay, and t goes on.
        maximize: whether the closure's gradient is one of ascent; False for a loss.
        extrapolate: False is normalized SGD with momentum, the paper's N-SGD-momentum.
        max_lookahead: largest (1 - eta_t) / eta_t, >= 0; None has no limit.

    Raises:
        ValueError: a number out of range; at a step, a sparse or complex gradient.
        RuntimeError: at a step, no closure or a momentum that is not finite.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = NormalizedPGIGT([x], lr=1.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> [round(value, 4) for value in x.tolist()]
        [2.4, 3.2]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        momentum: float = 1.0,
        schedule: str = "paper",
        normalize: bool = True,
        eps: float = 1e-12,
        maximize: bool = False,
        extrapolate: bool = True,
        max_lookahead: float | None = None,
    ) -> None:
        if max_lookahead is not None:
            checked_number("max_lookahead", max_lookahead, least=0)
        defaults = {"lr": lr, "momentum": momentum, "schedule": schedule, "eps": eps, "maximize": maximize}
        super().__init__(
            params, {**defaults, "normalize": normalize, "extrapolate": extrapolate, "max_lookahead": max_lookahead}
        )

    @property
    def eta(self) -> float:
        """eta_t of the step that comes next."""
        group = self.param_groups[0]
        return min(group["momentum"] * self._decay(0.8 if group["extrapolate"] else 2 / 3), 1.0)

    @property
    def lookahead_ratio(self) -> float:
        """(1 - eta_t) / eta_t of the step that comes next, as capped: how many last steps q_t lies ahead."""
        group = self.param_groups[0]
        if not group["extrapolate"] or self.iteration == 0:
            return 0.0
        ratio = (1 - self.eta) / self.eta
        return ratio if group["max_lookahead"] is None else min(ratio, group["max_lookahead"])

    def lookahead(self) -> contextlib.AbstractContextManager[None]:
        """Parameters are q_t inside: draw trajectories there where the closure doesn't draw its own."""
        ratio = self.lookahead_ratio
        return self._at(lambda point, previous: point + ratio * (point - previous))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: zeroes gradients, draws trajectories with the parameters as they are in the call (q_t), or takes
                those drawn within `lookahead`, computes the loss and its gradient; gives the loss.

        Returns:
            The closure's loss.
        """
        with self.lookahead():
            loss = self._closure_loss(closure)
        gradients = self._gradients()
        eta = self.eta if self.iteration else 1.0  # d_0 = g_0
        momenta = [
            g if eta == 1 or "momentum" not in self.state[p] else self.state[p]["momentum"].lerp(g, eta)
            for (_, p), g in zip(self._members(), gradients, strict=True)
        ]
        self._move(momenta, 1.0, self.param_groups[0]["normalize"])
        return loss


class HARPG(_Momentum):
    """HARPG and N-HARPG: recursive momentum corrected by one Hessian-vector product a step.

        u ~ U[0, 1],  m = u theta_t + (1 - u) theta_{t-1},   E[B(m) (theta_t - theta_{t-1})] = grad J_t - grad J_{t-1}
        d_t = (1 - eta_t) (d_{t-1} + B(m) (theta_t - theta_{t-1})) + eta_t g_t
        theta_{t+1} = theta_t + lr_t d_t / ||d_t||

    Two batches of trajectories a step, at theta_t and at m. Schedules: "paper" has eta_t = momentum 2/(t+2) and
    lr_t = lr 2/(t+2), or lr (2/(t+2))^(1/2) without normalization. At equal trajectories it is behind
    `NormalizedPGIGT` on small problems; it is for cheap rollouts and noisy rewards.

    Source: arXiv 2302.01734, algorithm (N)-HARPG.

    Args:
        params: parameters or groups, of any floating dtype.
        lr: gamma_0 > 0.
        momentum: eta_0, in (0, 1].
        schedule: "paper" or "constant".
        normalize: N-HARPG; False is HARPG.
        eps: below this norm of d the parameters stay.
        maximize: whether the closure's gradient is one of ascent; False for a loss. `hvp_closure` is not affected.
        generator: of u, on the CPU; None is seed 0. Its state is part of `state_dict`.

    Raises:
        ValueError: a number out of range; at a step, a sparse or complex gradient, or products of other shapes.
        RuntimeError: at a step, no closure or a momentum that is not finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        momentum: float = 1.0,
        schedule: str = "paper",
        normalize: bool = True,
        eps: float = 1e-12,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "schedule": schedule, "eps": eps, "maximize": maximize}
        super().__init__(params, {**defaults, "normalize": normalize})
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the generator's state."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator"})
        self.generator.set_state(state_dict["generator"].cpu())

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        hvp_closure: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
    ) -> Any:
        """One step.

        Args:
            closure: as in `NormalizedPGIGT.step`, at theta_t.
            hvp_closure: v to an unbiased B v at the parameters as they are in the call (m), in the direction of
                ascent of J = -loss, as `policy_hvp` gives it, from trajectories drawn with them. Not called at t = 0.

        Returns:
            The closure's loss.
        """
        products: Sequence[Tensor] | None = None
        members = self._members()
        if hvp_closure is None:
            raise RuntimeError("HARPG.step needs an hvp_closure")
        if self.iteration:
            moved = [self._point(p) - self.state[p]["previous"] for _, p in members]
            u = float(torch.rand((), generator=self.generator))
            with self._at(lambda point, previous: previous.lerp(point, u)), torch.enable_grad():
                products = list(hvp_closure([d.to(p.dtype) for d, (_, p) in zip(moved, members, strict=True)]))
            if len(products) != len(members) or any(
                b.shape != p.shape for b, (_, p) in zip(products, members, strict=True)
            ):
                raise ValueError("`hvp_closure` gives other shapes than the parameters; takes one tensor for each")
        with self._at(lambda point, _: point):
            loss = self._closure_loss(closure)
        momenta = self._gradients()
        if products is not None:
            eta = min(self.param_groups[0]["momentum"] * self._decay(1.0), 1.0)
            momenta = [
                (self.state[p]["momentum"] + b.to(g.dtype)).lerp(g, eta)
                for (_, p), b, g in zip(members, products, momenta, strict=True)
            ]
        self._move(momenta, 1.0 if self.param_groups[0]["normalize"] else 0.5, self.param_groups[0]["normalize"])
        return loss
