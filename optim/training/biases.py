"""Which solution an optimizer finds: weights that tend to be sparse, and preconditioners that forget less."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from trimtab.optim.checks import checked_choice, checked_number

__all__ = [
    "PRECONDITIONERS",
    "PowerProp",
    "apply_powerprop",
    "magnitude_prune_",
    "preconditioned_optimizer",
    "remove_powerprop",
]

PRECONDITIONERS = {
    "shampoo": {"lr": 0.01, "preconditioning_compute_steps": 1},
    "soap": {"lr": 3e-3, "precondition_frequency": 10},
}
"""Non-diagonal preconditioners of pytorch-optimizer with the settings measured here."""


class PowerProp(nn.Module):
    """w = v |v|^(alpha - 1) elementwise, for ``torch.nn.utils.parametrize``.

    Gradient descent on v moves w by -lr alpha^2 |w|^(2 - 2 / alpha) dL/dw to first order: what is large learns faster,
    what is small stays near 0, so that trained weights can be pruned further. Use SGD or momentum on v: Adam divides
    this factor away coordinate by coordinate.

    Sources: Schwarz, Jayakumar, Pascanu, Latham, Teh, "Powerpropagation: A sparsity inducing weight reparameterisation"
    (arXiv 2110.00296); as a preconditioner, Pascanu et al., "Optimizers Qualitatively Alter Solutions And We Should
    Leverage This" (arXiv 2507.12224).

    Args:
        alpha: >= 1; 1 changes nothing. From 2 on a weight cannot change its sign, which is warned of.

    Raises:
        ValueError: ``alpha`` below 1; in :meth:`right_inverse`, for weights that are all 0 and so would never move.

    Example:
        >>> PowerProp(2.0 - 1e-9)(torch.tensor([-2.0, 0.0, 3.0])).round().tolist()
        [-4.0, 0.0, 9.0]
    """

    def __init__(self, alpha: float = 1.5) -> None:
        super().__init__()
        self.alpha = checked_number("alpha", alpha, least=1)
        if self.alpha >= 2:
            warnings.warn(f"`alpha` is {alpha:g}: from 2 on a weight keeps its first sign", stacklevel=2)

    def forward(self, v: Tensor) -> Tensor:
        """w of v, any shape, in float32 or float64 arithmetic, v's dtype."""
        return v if self.alpha == 1 else _Power.apply(v, self.alpha)

    def right_inverse(self, w: Tensor) -> Tensor:
        """v of w: sign(w) |w|^(1 / alpha)."""
        if self.alpha == 1:
            return w
        if not bool(w.any()):
            raise ValueError(
                "`w` is all 0, where the gradient of v is 0 and nothing would ever move (LoRA's second matrix starts "
                "so); takes weights with non-zero starts: leave this one out"
            )
        return (w.sign() * w.abs().float().pow(1.0 / self.alpha)).to(w.dtype)


class _Power(torch.autograd.Function):
    """v |v|^(alpha - 1); autograd's own derivative of abs().pow() is 0 times infinity at 0."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.alpha = alpha
        return v * v.abs().pow(alpha - 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return gradient * ctx.alpha * v.abs().pow(ctx.alpha - 1.0), None


def apply_powerprop(
    module: nn.Module,
    alpha: float = 1.5,
    *,
    names: Sequence[str] = ("weight",),
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:
    """Reparametrizes weights of a module and of all in it; what it computes stays as it is.

    Until :func:`remove_powerprop` its ``state_dict`` holds ``parametrizations.weight.original`` in the place of
    ``weight``, so remove it before saving for Diffusers or PEFT. Optimizers are to be made afterwards.

    Args:
        module: e.g. a reward head, or LoRA's first matrices (``filter=lambda name, _: "lora_A" in name``); its second
            ones start at 0.
        alpha: see :class:`PowerProp`.
        names: of the parameters within each submodule.
        filter: takes a submodule's qualified name and itself; None takes all.

    Returns:
        Qualified names of the parameters.

    Raises:
        ValueError: no parameter matches, or one of them is all 0; then none is changed.
    """
    power = PowerProp(alpha)
    found = [
        (f"{path}.{name}" if path else name, child, name)
        for path, child in module.named_modules()
        for name in names
        if isinstance(child._parameters.get(name), nn.Parameter) and (filter is None or filter(path, child))
    ]
    if not found:
        raise ValueError(f"`module` has no parameter {', '.join(map(repr, names))} that the filter keeps; takes one")
    zero = [path for path, child, name in found if not bool(child._parameters[name].any())]
    if zero and alpha > 1:
        raise ValueError(f"`module` has weights that are all 0 and would never move, {', '.join(zero)}; leave them out")
    for _, child, name in found:
        parametrize.register_parametrization(child, name, power)
    return [path for path, _, _ in found]


def remove_powerprop(module: nn.Module) -> None:
    """Writes w in the place of v everywhere; ``state_dict`` has its former keys again."""
    for child in module.modules():
        for name, chain in list(getattr(child, "parametrizations", {}).items()):
            if any(isinstance(part, PowerProp) for part in chain):
                parametrize.remove_parametrizations(child, name, leave_parametrized=True)


@torch.no_grad()
def magnitude_prune_(module: nn.Module, sparsity: float, *, scope: str = "global") -> dict[str, float]:
    """Sets the smallest weights to exactly 0, in place; vectors and scalars are left alone.

    Args:
        module: without parametrizations.
        sparsity: part to set to 0, in [0, 1).
        scope: "global" compares all matrices' weights, "tensor" prunes each by itself.

    Returns:
        The part that is 0, by parameter.

    Raises:
        ValueError: ``sparsity`` or ``scope`` out of range, or reparametrized weights.
    """
    sparsity = checked_number("sparsity", sparsity, least=0)
    if sparsity >= 1:
        raise ValueError(f"`sparsity` is {sparsity:g}; takes a number in [0, 1)")
    checked_choice("scope", scope, ("global", "tensor"))
    if any(parametrize.is_parametrized(child) for child in module.modules()):
        raise ValueError("`module` is reparametrized; call remove_powerprop first")
    weights = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    together = [list(weights.values())] if scope == "global" else [[p] for p in weights.values()]
    for group in filter(None, together):
        order = torch.cat([p.abs().flatten() for p in group]).argsort(stable=True)
        keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
        keep[order[: round(sparsity * len(order))]] = False
        for parameter, part in zip(group, keep.split([p.numel() for p in group]), strict=True):
            parameter.mul_(part.view_as(parameter))
    return {name: float((p == 0).float().mean()) for name, p in weights.items()}


def preconditioned_optimizer(name: str, params: Iterable[Any], lr: float | None = None, **settings: Any) -> Optimizer:
    """Shampoo or SOAP of pytorch-optimizer (``pip install trimtab[training]``), with settings that were measured here.

    In learning one task after another a tuned Shampoo forgot least and had the widest range of good rates; most of its
    distance to Adam at a common rate goes when Adam's rate is tuned too (benchmarks/optim/optimizer_biases.py).

    Args:
        name: a key of :data:`PRECONDITIONERS`.
        params: parameters or groups of them.
        lr: None takes the measured one.
        settings: further arguments of the optimizer.

    Raises:
        ValueError: for another name.
    """
    defaults = PRECONDITIONERS[checked_choice("name", name, tuple(PRECONDITIONERS))]
    import pytorch_optimizer

    kind = {"shampoo": pytorch_optimizer.Shampoo, "soap": pytorch_optimizer.SOAP}[name]
    return kind(params, **(defaults | ({} if lr is None else {"lr": lr}) | settings))
