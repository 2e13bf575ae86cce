"""AdaGrad-Norm: gradient descent whose step falls with the gradients' summed squared norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_number

from .base import TrainingOptimizer

__all__ = ["AdaGradNorm"]


class AdaGradNorm(TrainingOptimizer):
    """AdaGrad with one scalar for all parameters of a group.

        v <- v + ||g||^2,   x <- x - lr g / sqrt(v)

    With a growing batch (:class:`AdaptiveBatchSize`) it is AdAdaGrad-Norm, which under the exact norm test finds
    min_k ||grad F(x_k)||^2 = O(1/K) with high probability, where a fixed batch gives O(1/sqrt(K)). Its state is one
    number a group. AdAdaGrad itself is ``torch.optim.Adagrad`` with the test "coordinate".

    Source: Lau, Liu, Kolar, "AdAdaGrad" (arXiv 2402.11215); the optimizer is Ward, Wu, Bottou's (arXiv 1806.01811).

    Args:
        params: parameters, or groups of them.
        lr: > 0, in the units of the parameters: the distance that the first steps cover.
        initial_accumulator: v_0 > 0, in units of the squared gradient.
        weight_decay: >= 0; decoupled, lr * weight_decay of the parameter a step.
        foreach: whether the fused multi-tensor functions are used; None does on a GPU.

    Raises:
        ValueError: a number out of range.
        RuntimeError: in :meth:`step`, for a sparse or complex gradient.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdaGradNorm([x], lr=1.0)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     x.square().sum().backward()
        ...     loss = optimizer.step()
        >>> bool(x.abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        initial_accumulator: float = 1e-2,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "initial_accumulator": initial_accumulator,
            "weight_decay": weight_decay,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name, bound in (
            ("lr", {"least": 0}),
            ("initial_accumulator", {"above": 0}),
            ("weight_decay", {"least": 0}),
        ):
            if not isinstance(group[name], Tensor):
                checked_number(name, group[name], **bound)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives what ``closure`` gave, which runs with gradients on."""
        loss = self._loss(closure)
        for group in self.param_groups:
            parameters = [p for _, p in self._with_gradients(group)]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters]
        state = self.state[group["params"][0]]
        if "sum" not in state:
            # the state of the group's first parameter holds what belongs to the group: state_dict carries it
            start = float(group["initial_accumulator"])
            state["sum"] = torch.full((), start, dtype=_wide(parameters[0]), device=parameters[0].device)
        foreach = parameters[0].is_cuda if group["foreach"] is None else group["foreach"]
        wide = [gradient.to(_wide(gradient)) for gradient in gradients]
        if foreach:
            norms = torch._foreach_norm(wide)
            squares = torch.stack([norm.to(state["sum"]) for norm in norms]).square().sum()
        else:
            squares = sum(gradient.square().sum().to(state["sum"]) for gradient in wide)
        state["sum"].add_(squares)
        rate, decay = group["lr"], 1.0 - group["lr"] * group["weight_decay"]
        factor = -rate / state["sum"].sqrt()
        if foreach:
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, decay)
            updates = torch._foreach_mul(wide, [factor.to(gradient.device, gradient.dtype) for gradient in wide])
            torch._foreach_add_(parameters, [u.to(p.dtype) for u, p in zip(updates, parameters, strict=True)])
            return
        for parameter, gradient in zip(parameters, wide, strict=True):
            if group["weight_decay"]:
                parameter.mul_(decay)
            parameter.add_((gradient * factor.to(gradient.device, gradient.dtype)).to(parameter.dtype))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
