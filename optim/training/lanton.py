"""LANTON: a Muon-type optimizer whose layers take smaller steps the noisier their gradients are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_count, checked_number

from .base import (
    TrainingOptimizer,
    add_updates,
    batches,
    check_finite,
    check_rates,
    checked_fraction,
    label,
    state_dtype,
)
from .dual_norms import NORM_KINDS, by_shape, dual_norms
from .orthogonalize import SCALES, fast_dtype, newton_schulz, step_scale

__all__ = ["Lanton"]


class Lanton(TrainingOptimizer):
    """Steps of fixed size along the steepest directions of momentum, scaled layer by layer by the gradients' noise.

        B <- momentum B + (1 - momentum) G
        H <- noise_beta H + (1 - noise_beta) ||G_t - G_{t-1}||_*^2,   a = alpha / sqrt(alpha^2 + H)
        X <- (1 - lr weight_decay) X - lr max(min_scale, sqrt(a / a_max)) s O(B)

    a_max is the largest a in the parameter group among the layers whose gradient is not zero. O and the dual norm
    ||.||_* follow the group's ``kind``: "spectral" (matrices: O orthogonal, s by `adjust_lr_fn`), "sign" (embeddings
    and output layers: the sign), "rms" (vectors: sqrt(d) B / ||B||). The first step is Muon's; `min_scale` = 1 is
    torch.optim.Muon throughout.

    The best rate differs from Muon's by several times: tune it anew. H depends on the batch size: set `alpha` for each.
    For weights trained on noisy gradients; of no use for latents or full batches. The floor `min_scale` is not the
    paper's: without it one layer free of noise stops all the others. State: the momentum, and the previous gradient
    unless `reference_grads` are given: two copies of the weights, as AdamW.

    Experimental: no gain beyond the spread of seeds was seen on small networks, and a step costs up to twice Muon's.

    Source: Hao et al., "Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for Deep
    Neural Network Training", arXiv 2510.14009, algorithm 1 with its options I (above) and II (`reference_grads`).

    Args:
        params: parameters, named parameters or groups with a ``kind``: `lanton_param_groups` makes them.
        lr: learning rate >= 0, a number or a tensor of one.
        momentum: in [0, 1).
        noise_beta: in [0, 1).
        alpha: noise, in the dual norm, from which on steps shrink; > 0.
        min_scale: least scale, in [0, 1]; 1 switches the adaptation off, 0 is the paper's.
        weight_decay: decoupled, >= 0; not scaled.
        nesterov: as torch.optim.Muon.
        ns_steps: iterations of Newton and Schulz.
        adjust_lr_fn: s, by `step_scale`: "match_rms_adamw", "original", "dion" (the paper's norm) or "none".
        noise_interval: steps between two measurements of H.
        ns_dtype: of the iterations; None is bfloat16 where the device has it.
        foreach: matrices of one shape together; None on CUDA only.

    Raises:
        ValueError: a number out of range, another name, a "spectral" parameter that is no matrix.
        TypeError: something of another type.
        RuntimeError: at a step: a sparse gradient, complex parameters, or a gradient that is not finite; before any
            state changes.

    Example:
        >>> weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
        >>> optimizer = Lanton(weights, lr=0.1)
        >>> sum(weight.square().sum() for weight in weights).backward()
        >>> optimizer.step()
        >>> optimizer.layer_scales()
        {0: 1.0, 1: 1.0}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        noise_beta: float = 0.95,
        alpha: float = 1.0,
        min_scale: float = 0.1,
        weight_decay: float = 0.1,
        nesterov: bool = False,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        noise_interval: int = 1,
        ns_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**given, "kind": "spectral"})
        self._scales: dict[Tensor, Tensor] = {}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_rates(group)
        for name in ("momentum", "noise_beta"):
            checked_fraction(name, group[name])
        checked_number("alpha", group["alpha"], above=0)
        checked_fraction("min_scale", group["min_scale"], closed=True)
        checked_count("ns_steps", group["ns_steps"], least=0)
        checked_count("noise_interval", group["noise_interval"])
        checked_choice("adjust_lr_fn", group["adjust_lr_fn"], SCALES)
        checked_choice("kind", group["kind"], NORM_KINDS)
        for number, p in enumerate(group["params"]):
            if group["kind"] == "spectral" and p.ndim != 2:
                raise ValueError(f"{label(group, number)} is no matrix; the kind 'spectral' takes matrices only")

    def layer_scales(self) -> dict[str | int, float]:
        """The last step's scale of each parameter that it moved, by name or else by place among all parameters."""
        names = [name for group in self.param_groups for name in group.get("param_names", group["params"])]
        params = [p for group in self.param_groups for p in group["params"]]
        named = [name if isinstance(name, str) else place for place, name in enumerate(names)]
        return {name: float(self._scales[p]) for name, p in zip(named, params, strict=True) if p in self._scales}

    @torch.compiler.disable  # which tensors take part depends on steps and data: a compiled loop runs this as it is
    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, reference_grads: Mapping[Tensor, Tensor] | None = None
    ) -> Any:
        """One step; gives the closure's loss, which is computed with gradients enabled.

        Args:
            closure: computes loss and gradients anew.
            reference_grads: an independent gradient at the same weights for every parameter that has one (option II):
                the noise is the distance to it, and the previous gradient is not kept.

        Raises:
            ValueError: if `reference_grads` lacks a parameter or has another shape for it.
        """
        loss = self._loss(closure)
        found = [(group, self._with_gradients(group)) for group in self.param_groups]
        check_finite(found, "Lanton")
        if reference_grads is not None:
            _check_references(found, reference_grads)
        for group, items in found:
            params = [p for _, p in items]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["step"] = torch.tensor(0.0)
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=state_dtype(p))
                self.state[p]["step"] += 1
            scales = self._noise_scales(group, params, reference_grads)
            self._scales.update(zip(params, scales, strict=True))
            for batch in batches(list(zip(params, scales, strict=True)), group["foreach"], params[0].device):
                self._move(group, batch)
        return loss

    def _noise_scales(
        self, group: dict[str, Any], params: Sequence[Tensor], references: Mapping[Tensor, Tensor] | None
    ) -> list[Tensor]:
        """Measures the noise where it is due; gives the scales, 0-d."""
        if group["min_scale"] == 1:
            return [torch.ones((), device=p.device) for p in params]
        interval = group["noise_interval"]
        differences: dict[Tensor, Tensor] = {}
        for p in params:
            state, step = self.state[p], int(self.state[p]["step"])
            gradient = p.grad.to(state_dtype(p))
            previous = state.pop("previous_grad", None) if references is None else references[p].to(gradient)
            if previous is not None and (references is not None or step % interval == 0):
                differences[p] = gradient - previous
            if references is None and (step + 1) % interval == 0:
                state["previous_grad"] = gradient.clone()
        for p, norm in zip(differences, dual_norms(list(differences.values()), group["kind"]), strict=True):
            noise = self.state[p].get("noise", torch.zeros_like(norm))
            self.state[p]["noise"] = torch.lerp(norm.square(), noise, group["noise_beta"])
        alpha, device = group["alpha"], params[0].device
        noises = [self.state[p].get("noise", torch.zeros((), device=p.device)).to(device) for p in params]
        a = alpha / (alpha**2 + torch.stack(noises)).sqrt()
        # A layer with a zero gradient is frozen or unused, not quiet: it must not set the measure.
        used = torch.stack([p.grad.count_nonzero().to(device) for p in params]) > 0
        greatest = torch.where(used, a, 0.0).max().clamp(min=torch.finfo(a.dtype).tiny)
        scales = (a / greatest).sqrt().clamp(group["min_scale"], 1.0)
        return [scale.to(p.device) for scale, p in zip(scales, params, strict=True)]

    def _move(self, group: dict[str, Any], batch: Sequence[tuple[Tensor, Tensor]]) -> None:
        params = [p for p, _ in batch]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad.to(buffer) for p, buffer in zip(params, buffers, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        momenta = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        directions = _directions(group, momenta)
        scaled = [direction * scale for direction, (_, scale) in zip(directions, batch, strict=True)]
        add_updates(params, scaled, group["lr"], group["weight_decay"])


def _directions(group: dict[str, Any], momenta: Sequence[Tensor]) -> list[Tensor]:
    """Steepest directions of unit norm, times what their kind is scaled by."""
    if group["kind"] == "sign":
        return list(torch._foreach_sign(momenta))
    if group["kind"] == "rms":
        # Divided first: a momentum of zero must give zero, not zero times infinity.
        return [m / m.norm().clamp(min=torch.finfo(m.dtype).tiny) * math.sqrt(m.numel()) for m in momenta]
    directions: list[Tensor] = [torch.empty(0)] * len(momenta)
    for places in by_shape(momenta):
        first = momenta[places[0]]
        stack = first if len(places) == 1 else torch.stack([momenta[place] for place in places])
        dtype = group["ns_dtype"] or fast_dtype(first.device)
        orthogonal = newton_schulz(stack, group["ns_steps"], dtype=dtype).to(first.dtype)
        orthogonal = orthogonal * step_scale(group["adjust_lr_fn"], *first.shape)
        for place, direction in zip(places, [orthogonal] if len(places) == 1 else orthogonal, strict=True):
            directions[place] = direction
    return directions


def _check_references(
    found: Iterable[tuple[dict[str, Any], Sequence[tuple[int, Tensor]]]], references: Mapping[Tensor, Tensor]
) -> None:
    for group, items in found:
        for number, p in items:
            got = references.get(p)
            if got is None or got.shape != p.shape:
                what = "nothing" if got is None else f"shape {tuple(got.shape)}"
                raise ValueError(f"`reference_grads` has {what} for {label(group, number)}; takes its shape")
