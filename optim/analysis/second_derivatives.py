"""Products of second derivatives with vectors; what torch would take for 0 in silence is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["central_difference", "default_step", "differentiated", "evaluated", "gauss_newton_product", "gradients_of"]

_TAKES = 'takes one that has, or method="finite_difference"'


def evaluated(closure: Callable[[], Tensor], with_gradient: bool) -> Tensor:
    """The loss as a tensor without axes, its attention without fused kernels; ValueError unless it is one number."""
    with torch.set_grad_enabled(with_gradient), sdpa_kernel(SDPBackend.MATH):
        value = closure()
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"the loss is {got}; takes a tensor of a single number")
    return value.reshape(())


def gradients_of(loss: Tensor, tensors: list[Tensor], *, create_graph: bool) -> list[Tensor | None]:
    """The loss's gradients, None where it doesn't depend on a tensor; ValueError where it depends on none."""
    if not loss.requires_grad:
        raise ValueError("the loss depends on none of `params`; takes tensors that it is computed from")
    _check_graph([loss])
    found = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
    if create_graph:
        _check_graph(part for part in found if part is not None)
    return list(found)


def _check_graph(roots: Iterable[Tensor]) -> None:
    """Refuses what torch would take for a Hessian of 0 in silence.

    Re-entrant checkpoints hide their parameters from the graph; a function without a second derivative ends it.
    """
    todo, seen = [root.grad_fn for root in roots], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name == "CheckpointFunctionBackward":
            raise RuntimeError("the loss has re-entrant gradient checkpointing; takes use_reentrant=False, or none")
        if name.split("::")[-1] in ("Error", "NotImplemented"):
            raise RuntimeError(f"the loss has a function without a second derivative; {_TAKES}")
        todo += [following for following, _ in node.next_functions]


def differentiated(gradients: list[Tensor | None], v: list[Tensor], tensors: list[Tensor], keep: bool) -> list[Tensor]:
    """The gradient of <gradients, v>, zeros where there is none."""
    terms = [(g * u).sum() for g, u in zip(gradients, v, strict=True) if g is not None and g.requires_grad]
    if not terms:  # the loss is linear
        return [torch.zeros_like(tensor) for tensor in tensors]
    with _explained():
        found = torch.autograd.grad(sum(terms), tensors, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(t) if h is None else h for h, t in zip(found, tensors, strict=True)]


def default_step(tensors: list[Tensor]) -> float:
    """1e-3 in float32 and 1e-5 in float64, times max(1, ||w||)."""
    relative = 1e-3 if any(t.dtype == torch.float32 for t in tensors) else 1e-5
    return relative * max(1.0, sum(float(t.detach().double().square().sum()) for t in tensors) ** 0.5)


def central_difference(
    closure: Callable[[], Tensor], tensors: list[Tensor], v: list[Tensor], eps: float
) -> list[Tensor]:
    """(g(w + eps v) - g(w - eps v)) / 2 eps of unit v, times v's length; tensors are as before afterwards."""
    length = sum(float(part.double().square().sum()) for part in v) ** 0.5
    if length == 0:
        return [torch.zeros_like(part) for part in v]
    before, found = [t.detach().clone() for t in tensors], []
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for tensor, start, part in zip(tensors, before, v, strict=True):
                    tensor.copy_(start + part * (sign * eps / length))
            found.append(gradients_of(evaluated(closure, True), tensors, create_graph=False))
    finally:
        with torch.no_grad():
            for tensor, start in zip(tensors, before, strict=True):
                tensor.copy_(start)
    return [
        torch.zeros_like(part) if up is None or down is None else (up - down) * (length / (2 * eps))
        for up, down, part in zip(*found, v, strict=True)
    ]


def gauss_newton_product(
    outputs: Tensor, loss_fn: Callable[[Tensor, Any], Tensor], targets: Any, tensors: list[Tensor], v: list[Tensor]
) -> list[Tensor]:
    """J^T (d2 loss / d output^2) J v of one batch; J v is the derivative of <J^T u, v> with respect to u."""
    u = torch.zeros_like(outputs, requires_grad=True)
    with _explained():
        pulled = torch.autograd.grad(outputs, tensors, u, create_graph=True, allow_unused=True)
        (pushed,) = differentiated(list(pulled), v, [u], True)
        free = outputs.detach().requires_grad_()
        slopes = gradients_of(evaluated(lambda: loss_fn(free, targets), True), [free], create_graph=True)
        (curved,) = differentiated(slopes, [pushed], [free], False)
        found = torch.autograd.grad(outputs, tensors, curved, allow_unused=True)
    return [torch.zeros_like(t) if part is None else part for part, t in zip(found, tensors, strict=True)]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Adds to torch's errors what can be done about them."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "is not implemented" in text and "derivative" in text:
            raise RuntimeError(f"{text.splitlines()[0]}: no second derivative; {_TAKES}") from error
        raise
