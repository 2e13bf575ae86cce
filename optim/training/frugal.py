"""FRUGAL: state for a part of every matrix, a rule without state for the rest of its gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

from .base import (
    TrainingOptimizer,
    adam_directions,
    add_updates,
    batches,
    check_finite,
    check_rates,
    checked_betas,
    checked_fraction,
    label,
    momentum_directions,
    state_dtype,
)
from .projections import BLOCK_ORDERS, KINDS, SIDES, Projection, active_blocks, draw, stored

__all__ = ["Frugal"]

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgdm": ("momentum_buffer",)}
_GRADIENT_KINDS = ("svd", "dct")
_SEED_RANGE = 2**31


class Frugal(TrainingOptimizer):
    """A stateful optimizer on a share of every matrix, sign or plain gradient steps on all the rest.

        g_full = P(g),  g_free = g - P^-1(g_full)
        theta <- (1 - lr weight_decay) theta - lr P^-1(u(g_full)) - lr state_free_lr_scale u_free(g_free)

    with u from AdamW or SGD with momentum, kept in the coordinates of P, and u_free the sign or the identity. P is
    chosen anew every `update_gap` steps. Density 1 with an index projection ("columns", "rows", "randk", "randperm",
    "blockwise") is the stateful optimizer, density 0 the state-free one.

    For full or partial finetuning and distillation, where the optimizer's state is the largest item after weights and
    gradients. It does nothing for LoRA or other adapters, whose state is negligible, nor for a single latent. Clipping
    the gradient does not act on the sign part. "svd" and "random" take the sign of the remainder as the paper does, and
    it leaves the complement of P: a part of the step lies in P's span.

    Source: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    arXiv 2411.07837, algorithm 1 and the projections of its section 4. Convergence is proved for SGD with momentum
    beside SGD; for AdamW beside signSGD there is no proof.

    Args:
        params: parameters, named parameters or groups. A group with ``projected=False`` is left to the stateful
            optimizer alone: `frugal_param_groups` makes such groups.
        lr: learning rate >= 0, a number or a tensor of one.
        betas: of AdamW, in [0, 1).
        eps: of AdamW, >= 0.
        weight_decay: decoupled, >= 0.
        density: share of the coordinates that have state, in [0, 1]; so small that it rounds to none means none.
        update_gap: steps between two choices of P.
        projection: "columns", "rows" or "randk" (entries) at random; "randperm" (columns or rows, as `side` says);
            "svd" (GaLore's singular vectors of the gradient), "random" (orthonormal), "dct" (columns of the cosine
            transform by their alignment: only indices are kept); "blockwise" (whole tensors in turn, as BAdam).
        side: which axis "svd", "random", "dct" and "randperm" project: "std" the shorter, "reverse_std", "left",
            "right", and "full" for "svd" and "random".
        stateful: "adamw" or "sgdm".
        momentum: of "sgdm", in [0, 1).
        dampening: of "sgdm", in [0, 1], as in torch.optim.SGD; equal to `momentum` for the paper's average.
        state_free: "sign", "sgd", or "none": then the remainder is dropped, as GaLore and BAdam do.
        state_free_lr_scale: >= 0; 1 in the paper's pretraining, 0.1 in its finetuning.
        reset_state: forget the moments with P; otherwise those of coordinates that stay are kept.
        block_order: of "blockwise": "random", "ascending", "descending" or "mirror".
        foreach: all tensors of a group at once, which holds full-sized temporaries of all; None on CUDA only.
        generator: gives the seed of all draws; None is seed 0. Draws depend on seed, parameter and step alone.

    Raises:
        ValueError: a number out of range, another name, a projected parameter of fewer than two dimensions (but for
            "blockwise").
        TypeError: something of another type.
        RuntimeError: at a step: a sparse gradient, complex parameters; where P is chosen by the gradient, one that is
            not finite; before any state changes.

    Warns:
        UserWarning: parameters in half precision: steps below their spacing vanish, so keep a float32 copy.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Frugal([{"params": [model.weight]}, {"params": [model.bias], "projected": False}], lr=1e-2)
        >>> model(torch.ones(1, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        projection: str = "columns",
        side: str = "std",
        stateful: str = "adamw",
        momentum: float = 0.9,
        dampening: float = 0.0,
        state_free: str = "sign",
        state_free_lr_scale: float = 1.0,
        reset_state: bool = True,
        block_order: str = "random",
        foreach: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "generator")}
        given.pop("__class__", None)
        source = checked_generator(generator)
        seed = int(torch.randint(_SEED_RANGE, (), generator=source, device=source.device))
        super().__init__(params, {**given, "projected": True, "seed": seed})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rates(group)
        checked_betas(group["betas"])
        for name in ("eps", "state_free_lr_scale"):
            checked_number(name, group[name], least=0)
        checked_fraction("density", group["density"], closed=True)
        checked_fraction("momentum", group["momentum"])
        checked_fraction("dampening", group["dampening"], closed=True)
        checked_count("update_gap", group["update_gap"])
        for name, choices in (
            ("projection", KINDS),
            ("side", SIDES),
            ("stateful", tuple(_MOMENTS)),
            ("state_free", ("sign", "sgd", "none")),
            ("block_order", BLOCK_ORDERS),
        ):
            checked_choice(name, group[name], choices)
        if group["side"] == "full" and group["projection"] in ("dct", "randperm"):
            raise ValueError(
                f"`side` is 'full'; {group['projection']!r} takes one axis: left, right, std or reverse_std"
            )
        for number, p in enumerate(group["params"]):
            if group["projected"] and group["projection"] != "blockwise" and p.ndim < 2:
                raise ValueError(
                    f"{label(group, number)} cannot be projected: takes two dimensions or more; put it into a group "
                    "with projected=False, as frugal_param_groups does"
                )
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"]):
            message = (
                "parameters in half precision: steps below their spacing vanish; keep a float32 copy of the weights"
            )
            warnings.warn(message, UserWarning, stacklevel=4)

    @torch.compiler.disable  # which tensors take part depends on steps and data: a compiled loop runs this as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives the closure's loss, which is computed with gradients enabled."""
        loss = self._loss(closure)
        found = [(group, self._with_gradients(group)) for group in self.param_groups]
        due = [self._due(group, items) for group, items in found]
        chosen = [
            (group, changed)
            for (group, _), changed in zip(found, due, strict=True)
            if group["projected"] and group["projection"] in _GRADIENT_KINDS
        ]
        check_finite(chosen, "Frugal")
        for place, ((group, items), changed) in enumerate(zip(found, due, strict=True)):
            for number, p in changed:
                self._change(group, place, number, p)
            ready = [(p, *self._projected(group, p)) for _, p in items]
            for batch in batches(ready, group["foreach"], items[0][1].device if items else None):
                self._update(group, batch)
            count = self._count(group) + 1
            for _, p in items:
                self.state[p]["step"].fill_(count)
        return loss

    def _count(self, group: dict[str, Any]) -> int:
        """Steps that a group has made, also where some of its parameters had no gradient."""
        return max((int(self.state[p]["step"]) for p in group["params"] if p in self.state), default=0)

    def _due(self, group: dict[str, Any], items: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """The parameters that get a new projection, or their first, before this step."""
        refresh, gap = self._count(group) // group["update_gap"], group["update_gap"]

        def last(p: Tensor) -> int:
            step = int(self.state[p]["step"]) if p in self.state else 0
            return (step - 1) // gap if step else -1

        if not group["projected"]:
            return [(number, p) for number, p in items if p not in self.state]
        return [(number, p) for number, p in items if last(p) != refresh]

    def _change(self, group: dict[str, Any], place: int, number: int, p: Tensor) -> None:
        """Chooses a parameter's projection and resets its moments or takes them along."""
        state, matrix = self.state[p], _as_matrix(p.grad)
        state.setdefault("step", torch.tensor(0.0))
        if not group["projected"]:
            _start(state, group, matrix.reshape(p.shape))
            return
        kind, refresh = group["projection"], self._count(group) // group["update_gap"]
        if kind == "blockwise":
            shared = _generator(group["seed"], place, 0, refresh)
            active = active_blocks(group["block_order"], len(group["params"]), group["density"], refresh, shared)
            stays = "age" in state and not group["reset_state"]
            if number in active and not stays:
                _start(state, group, matrix)
            elif number not in active:
                _forget(state)
            return
        old = stored(kind, group["side"], state, matrix)
        moments = {name: state[name] for name in _MOMENTS[group["stateful"]] if name in state}
        draws = _generator(group["seed"], place, number + 1, refresh)
        new = draw(kind, group["side"], group["density"], matrix, draws)
        if new is None:
            _forget(state)
            return
        for name in ("indices", "left", "right"):
            state.pop(name, None)
        state.update(new[1])
        if old is None or group["reset_state"]:
            _start(state, group, new[0].down(matrix))
            return
        state.update({name: _carried(old, new[0], moment, matrix) for name, moment in moments.items()})
        if "exp_avg_sq" in moments:
            state["exp_avg_sq"].abs_()

    def _projected(self, group: dict[str, Any], p: Tensor) -> tuple[Projection | None, Tensor]:
        """What takes part of the gradient, and the gradient as a matrix; None where all or none of it has state."""
        matrix = _as_matrix(p.grad)
        if not group["projected"]:
            return None, matrix.reshape(p.shape)
        if group["projection"] == "blockwise":
            return None, matrix
        return stored(group["projection"], group["side"], self.state[p], matrix), matrix

    def _update(self, group: dict[str, Any], batch: Sequence[tuple[Tensor, Projection | None, Tensor]]) -> None:
        """Moves some parameters of a group."""
        parts = [self._parts(p, projection, matrix) for p, projection, matrix in batch]
        stateful = [(self.state[p], low) for (p, _, _), (low, _) in zip(batch, parts, strict=True) if low is not None]
        moved = iter(self._directions(group, stateful))
        free = iter(_free(group, [rest for _, rest in parts if rest is not None]))
        directions = []
        for (p, projection, _), (low, _) in zip(batch, parts, strict=True):
            if projection is None:
                direction = next(free) if low is None else next(moved)
            else:
                direction = projection.join(next(moved), next(free))
            directions.append(direction.reshape(p.shape))
        add_updates([p for p, _, _ in batch], directions, group["lr"], group["weight_decay"])

    def _parts(self, p: Tensor, projection: Projection | None, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Coordinates and remainder; without a projection a gradient is all the one or all the other."""
        if projection is not None:
            return projection.split(matrix)
        return (matrix, None) if "age" in self.state[p] else (None, matrix)

    def _directions(self, group: dict[str, Any], items: list[tuple[dict[str, Any], Tensor]]) -> list[Tensor]:
        if not items:
            return []
        for state, _ in items:
            state["age"] += 1
        ages = [float(state["age"]) for state, _ in items]
        gradients = [low for _, low in items]
        moments = [[state[name] for state, _ in items] for name in _MOMENTS[group["stateful"]]]
        if group["stateful"] == "adamw":
            return adam_directions(gradients, *moments, ages, group["betas"], group["eps"])
        return momentum_directions(gradients, *moments, ages, group["momentum"], group["dampening"])


def _as_matrix(gradient: Tensor) -> Tensor:
    """The gradient (n, ...) as (n, m) in the dtype of the state; a copy where that is another."""
    gradient = gradient.to(state_dtype(gradient))
    return gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient.reshape(1, -1)


def _generator(seed: int, place: int, number: int, refresh: int) -> torch.Generator:
    """Draws of one parameter at one change: no state to be kept, so a resumed run draws alike."""
    mixed = (((seed * 1_000_003 + place) * 1_000_003 + number) * 1_000_003 + refresh) % 2**63
    return torch.Generator().manual_seed(mixed)


def _start(state: dict[str, Any], group: dict[str, Any], like: Tensor) -> None:
    state["age"] = torch.tensor(0.0)
    for name in _MOMENTS[group["stateful"]]:
        state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)


def _forget(state: dict[str, Any]) -> None:
    for name in [name for name in state if name != "step"]:
        del state[name]


def _carried(old: Projection, new: Projection, moment: Tensor, matrix: Tensor) -> Tensor:
    """A moment in the coordinates of another projection."""
    return new.down(old.join(moment, torch.zeros_like(matrix))).contiguous()


def _free(group: dict[str, Any], rests: list[Tensor]) -> list[Tensor]:
    """Directions of the rule without state."""
    if not rests:
        return []
    if group["state_free"] == "none":
        return [torch.zeros_like(rest) for rest in rests]
    scale = group["state_free_lr_scale"]
    directions = list(torch._foreach_sign(rests)) if group["state_free"] == "sign" else rests
    return directions if scale == 1 else list(torch._foreach_mul(directions, scale))
