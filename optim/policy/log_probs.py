"""What a policy's log-probabilities give: the score-function loss and products with the objective's Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.optim.checks import checked_choice, checked_number

__all__ = ["gaussian_log_prob", "policy_gradient_surrogate", "policy_hvp"]


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor | float, *, reduce: str = "sum") -> Tensor:
    """Log-density of N(mean, std^2) at x, over all dimensions but the first.

    Args:
        x: (B, ...), floating; what was drawn. It is taken as a constant only if the caller detached it.
        mean: of x's shape, or one that broadcasts to it.
        std: > 0, a number or a tensor that broadcasts.
        reduce: "sum" is the log-density; "mean" divides it by the coordinates, as DDPO and Flow-GRPO do for ratios of
            many coordinates. Products with Hessians need the sum.

    Returns:
        (B,), float32 at the least.

    Raises:
        ValueError: for a scale that is not above 0, or another `reduce`.

    Example:
        >>> round(float(gaussian_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)), 4)
        -1.8379
    """
    checked_choice("reduce", reduce, ("sum", "mean"))
    precise = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    scale = torch.as_tensor(std, dtype=precise, device=x.device)
    if not bool((scale > 0).all()):
        raise ValueError("`std` has values that are not above 0; takes positive scales")
    z = (x.to(precise) - mean.to(precise)) / scale
    log_density = (-0.5 * (z.square() + math.log(2 * math.pi)) - scale.log()).flatten(1)
    return log_density.sum(1) if reduce == "sum" else log_density.mean(1)


def policy_gradient_surrogate(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-mean_i sum_k A_ik log pi_ik: a loss whose gradient is -g, minus the score-function estimate of grad J.

    Args:
        log_probs: (B,) of whole trajectories or (B, K) of their steps, with a graph to the policy.
        advantages: (B,) or (B, K), taken as constants: return less a baseline, per trajectory or per step.

    Returns:
        A scalar. Its value means nothing; its gradient does.

    Raises:
        ValueError: for other shapes.

    Example:
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> policy_gradient_surrogate(theta.log_softmax(0)[[0, 1]], torch.tensor([1.0, -1.0])).backward()
        >>> theta.grad.tolist()
        [-0.5, 0.5]
    """
    log_probs, advantages = _pair(log_probs, advantages)
    return -(advantages * log_probs).sum(1).mean()


def policy_hvp(
    log_probs_fn: Callable[[], Tensor],
    params: Sequence[Tensor],
    v: Sequence[Tensor],
    advantages: Tensor,
    *,
    method: str = "double_backward",
    step: float = 1e-3,
) -> list[Tensor]:
    """An unbiased estimate of (Hessian of J) v from trajectories of the present policy, in the direction of ascent.

    With Phi_i = sum_k A_ik log pi_ik and log p_i = sum_k log pi_ik of one trajectory i,

        B_i v = grad Phi_i <grad log p_i, v> + (Hessian of Phi_i) v,        E[B_i v] = (Hessian of J) v

    and the mean over i is of the products, as the product of means would be biased. A baseline in the advantages is
    in both terms, where it belongs. No matrix is built and no trajectory has a backward pass of its own.

    Source: Fatkhullin, Barakat, Kireeva, He, "Stochastic Policy Gradient Methods: Improved Sample Complexity for
    Fisher-non-degenerate Policies", arXiv 2302.01734, the estimator B of HARPG.

    Args:
        log_probs_fn: gives log-probabilities, (B,) or (B, K), of fixed trajectories at the parameters as they are,
            summed over coordinates, not averaged; the same function each time it is called.
        params: the parameters, which require gradients.
        v: one tensor for each, of its shape.
        advantages: (B,) or (B, K), constants.
        method: "double_backward" is exact and needs a network that has second derivatives: no fused attention
            (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`), no re-entrant checkpointing. "finite_difference"
            takes central differences along v with the trajectories held fixed, in float32 or float64 parameters.
        step: of the differences, relative to ||params|| / ||v||, > 0.

    Returns:
        One tensor for each parameter, without history.

    Raises:
        ValueError: for shapes that don't fit, or another method.
        RuntimeError: where the network has no second derivative.
    """
    checked_choice("method", method, ("double_backward", "finite_difference"))
    params, v = list(params), list(v)
    if len(params) != len(v) or any(p.shape != d.shape for p, d in zip(params, v, strict=True)):
        raise ValueError("`v` has other shapes than `params`; takes one tensor for each parameter, of its shape")
    with torch.enable_grad():
        if method == "finite_difference":
            return _by_differences(log_probs_fn, params, v, advantages, checked_number("step", step, above=0))
        log_probs, weights = _pair(log_probs_fn(), advantages)
        phi, log_p = (weights * log_probs).sum(1), log_probs.sum(1)
        score = _jvp(log_p, params, v).detach()
        total = score @ phi + _jvp(phi, params, v).sum()
        return _filled(torch.autograd.grad(total / len(phi), params, allow_unused=True), params)


def _jvp(outputs: Tensor, params: list[Tensor], v: list[Tensor]) -> Tensor:
    """<grad outputs_i, v> for each i, by two backward passes: the first is linear in its cotangents."""
    cotangents = torch.ones_like(outputs, requires_grad=True)
    gradients = torch.autograd.grad(outputs, params, cotangents, create_graph=True, allow_unused=True)
    product = sum((g * d).sum() for g, d in zip(gradients, v, strict=True) if g is not None)
    return torch.autograd.grad(product, cotangents, create_graph=True)[0]


def _by_differences(
    log_probs_fn: Callable[[], Tensor], params: list[Tensor], v: list[Tensor], advantages: Tensor, step: float
) -> list[Tensor]:
    lengths = [math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors)) for tensors in (params, v)]
    if lengths[1] == 0:
        return [torch.zeros_like(p) for p in params]
    h = step * max(lengths[0], 1.0) / lengths[1]
    origin = [p.detach().clone() for p in params]
    gradients, log_ps = [], []
    try:
        for sign in (1, -1):
            _set(params, origin, v, sign * h)
            log_probs, weights = _pair(log_probs_fn(), advantages)
            log_ps.append(log_probs.sum(1).detach())
            mean = (weights * log_probs).sum(1).mean()
            gradients.append(_filled(torch.autograd.grad(mean, params, allow_unused=True), params))
        _set(params, origin, v, 0.0)
        log_probs, weights = _pair(log_probs_fn(), advantages)
        score = (log_ps[0] - log_ps[1]) / (2 * h)
        first = torch.autograd.grad((score * (weights * log_probs).sum(1)).mean(), params, allow_unused=True)
    finally:
        _set(params, origin, v, 0.0)
    ahead, behind = gradients
    return [f + (a - b) / (2 * h) for f, a, b in zip(_filled(first, params), ahead, behind, strict=True)]


@torch.no_grad()
def _set(params: list[Tensor], origin: list[Tensor], v: list[Tensor], h: float) -> None:
    for p, start, direction in zip(params, origin, v, strict=True):
        p.copy_(start if h == 0 else start + h * direction)


def _filled(gradients: Sequence[Tensor | None], params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(gradients, params, strict=True)]


def _pair(log_probs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, K)."""
    if log_probs.ndim not in (1, 2) or not log_probs.numel():
        raise ValueError(f"`log_probs` has shape {tuple(log_probs.shape)}; takes (B,) or (B, K)")
    if advantages.shape not in (log_probs.shape, log_probs.shape[:1]):
        raise ValueError(
            f"`advantages` has shape {tuple(advantages.shape)}; takes {tuple(log_probs.shape)} or {(len(log_probs),)}"
        )
    rows = len(log_probs)
    return log_probs.reshape(rows, -1), advantages.detach().to(log_probs.dtype).reshape(rows, -1)
