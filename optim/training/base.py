"""What the training optimizers share: their arguments, gradients, states and the rules of Adam and SGD on lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_number

__all__ = [
    "TrainingOptimizer",
    "add_updates",
    "adam_directions",
    "batches",
    "check_finite",
    "check_rates",
    "checked_betas",
    "checked_fraction",
    "label",
    "momentum_directions",
    "state_dtype",
]

_ON_CPU = ("step", "age")


class TrainingOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose states keep their own dtypes when loaded, and that refuses gradients it cannot use."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim.Optimizer does; raises as the constructor."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError for a group's arguments, which have their defaults by then."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; the tensors keep their dtypes.

        Raises:
            ValueError: for other parameter groups.
        """
        super().load_state_dict(state_dict)
        # torch casts every state tensor to its parameter's dtype: indices and float32 moments must not be.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if key in _ON_CPU else p.device
                    self.state[p][key] = value.detach().to(device, copy=True)

    def _with_gradients(self, group: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """Parameters of a group that have a gradient, with their numbers in it."""
        found = []
        for number, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} takes no sparse gradients; {label(group, number)} has one")
            if torch.is_complex(p):
                raise RuntimeError(f"{type(self).__name__} takes no complex parameters; {label(group, number)} is one")
            found.append((number, p))
        return found

    @staticmethod
    def _loss(closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()


def check_rates(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError unless a group's learning rate and weight decay are numbers >= 0."""
    if not isinstance(group["lr"], Tensor) or group["lr"].numel() != 1:
        checked_number("lr", group["lr"], least=0)
    checked_number("weight_decay", group["weight_decay"], least=0)


def label(group: dict[str, Any], number: int) -> str:
    """How an error names a parameter of a group: by its name where the optimizer got names."""
    names, shape = group.get("param_names"), tuple(group["params"][number].shape)
    return f"{names[number] if names else f'parameter {number} of its group'} of shape {shape}"


def checked_betas(value: Any) -> tuple[float, float]:
    """Two numbers in [0, 1); raises ValueError otherwise."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"`betas` is {value!r}; takes two numbers in [0, 1)")
    return checked_fraction("betas[0]", value[0]), checked_fraction("betas[1]", value[1])


def checked_fraction(name: str, value: Any, *, closed: bool = False) -> float:
    """A number in [0, 1), or in [0, 1] if ``closed``; raises ValueError or TypeError otherwise."""
    number = checked_number(name, value, least=0)
    if number > 1 or (number == 1 and not closed):
        raise ValueError(f"`{name}` is {value}; takes a number in [0, 1{']' if closed else ')'}")
    return number


def check_finite(groups: Iterable[tuple[dict[str, Any], Sequence[tuple[int, Tensor]]]], optimizer: str) -> None:
    """Raises RuntimeError if a gradient is not finite, naming it; waits once for the device."""
    for group, found in groups:
        if not found:
            continue
        norms = torch._foreach_norm([p.grad for _, p in found])
        if bool(torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms]).sum())):
            continue
        for number, p in found:
            if not bool(torch.isfinite(p.grad).all()):
                raise RuntimeError(f"{optimizer} takes finite gradients; that of {label(group, number)} is not")


def state_dtype(p: Tensor) -> torch.dtype:
    """float32, or float64 for such parameters."""
    return torch.promote_types(p.dtype, torch.float32)


def batches(items: Sequence[Any], foreach: bool | None, device: torch.device | None) -> Iterator[Sequence[Any]]:
    """All items at once for foreach, each alone otherwise; None is foreach on CUDA, as in torch.optim."""
    if not items:
        return
    if foreach or (foreach is None and device is not None and device.type == "cuda"):
        yield items
    else:
        yield from ([item] for item in items)


def adam_directions(
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    ages: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Adam's directions m' / (sqrt(v') + eps), m' and v' without bias; updates the moments in place.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, algorithm 1.

    Args:
        gradients: in the moments' dtypes.
        first: m, one tensor for each gradient.
        second: v.
        ages: how many gradients, this one included, each pair of moments has seen.
        betas: decay of m and of v.
        eps: see above.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, [math.sqrt(1 - beta2**age) for age in ages])
    torch._foreach_add_(scale, eps)
    directions = list(torch._foreach_div(first, scale))
    torch._foreach_div_(directions, [1 - beta1**age for age in ages])
    return directions


def momentum_directions(
    gradients: list[Tensor], buffers: list[Tensor], ages: Sequence[float], momentum: float, dampening: float
) -> list[Tensor]:
    """torch.optim.SGD's buffer after b <- momentum b + (1 - dampening) g, and b = g at the first gradient."""
    torch._foreach_mul_(buffers, momentum)
    weights = [1.0 if age == 1 else 1.0 - dampening for age in ages]
    torch._foreach_add_(buffers, torch._foreach_mul(gradients, weights))
    return [buffer.clone() for buffer in buffers]


def add_updates(params: list[Tensor], directions: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """p <- (1 - lr weight_decay) p - lr direction, in place."""
    if isinstance(lr, Tensor):
        lr = float(lr)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)
