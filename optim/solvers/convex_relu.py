"""Two-layer ReLU networks trained to the optimum over given activation patterns, by a convex program and ADMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.optim.checks import checked_choice, checked_count, checked_generator, checked_number

from .activation_patterns import ActivationPatterns, module_patterns, two_layers
from .relu_admm import ADMM
from .relu_gap import check_epsilon, dual_bound, repaired
from .relu_inner import INNER_SOLVERS
from .relu_program import ConvexReLUResult, ReLUProgram, balanced, relu_objective

__all__ = ["PolishResult", "convex_relu", "polish"]


@torch.no_grad()
def convex_relu(
    X: Tensor,
    y: Tensor | None,
    patterns: ActivationPatterns,
    *,
    beta: float,
    loss: Literal["squared", "hinge", "logistic"] = "squared",
    pairs: Tensor | None = None,
    bias: bool = True,
    epsilon: float = 0.0,
    inner: Literal["cholesky", "cg", "rbcd"] = "cholesky",
    rho: float | None = None,
    max_iterations: int = 2000,
    tolerance: float = 1e-6,
    initial: Tensor | None = None,
    offset: float = 0.0,
    acceleration: int = 10,
    generator: torch.Generator | None = None,
) -> ConvexReLUResult:
    """The best two-layer ReLU network over activation patterns D_i, as a convex program.

        min sum_k loss(a_k, y_k) + beta sum_i (||v_i|| + ||w_i||),   a = sum_i D_i X (v_i - w_i)
        such that (2 D_i - I) X v_i >= 0 and (2 D_i - I) X w_i >= 0

    Its optimum is that of min loss + beta/2 sum_j (||u_j||^2 + alpha_j^2) over networks sum_j alpha_j (X u_j)_+ whose
    neurons have these patterns; over all networks where the patterns are all that the data have. Solved by ADMM with
    u = v and G u = s split, as in "Efficient Global Optimization of Two-layer ReLU Networks" (arXiv:2201.01965).
    Our choices: steps are over-relaxed and accelerated, and a loss other than the squared one is split off, too, with
    its closed proximal step. With "rbcd" any loss is: the paper's blocks descend on the loss itself, whose curvature to
    rho makes them creep at the small rho that ADMM wants.

    With `epsilon` the loss is of the worst point of a box |x - x_k|_inf <= epsilon around each row, exactly so while
    the patterns are fixed over the boxes, which the constraints (2 d_ik - 1) x_k^T v_i >= epsilon ||v_i||_1 see to.
    For the hinge that is the paper's adversarial program (with its 1/n in beta); for the squared loss
    (|a_k - y_k| + epsilon ||T_k||_1)^2 / 2.

    Args:
        X: (n, d) floating, the data; standardize it first.
        y: (n,) targets, -1 and +1 for "hinge" and "logistic"; None with `pairs`.
        patterns: of `sample_patterns`, `enumerate_patterns` or `module_patterns` over the same rows and `bias`.
        beta: > 0, weight decay.
        loss: "squared" is half the square. All are sums over rows.
        pairs: (m, 2) int64, rows of which the first is preferred: the loss is of the difference of their outputs.
        bias: neurons have a bias, decayed like the other weights; it is not perturbed.
        epsilon: >= 0, in units of the data.
        inner: how the least-squares step is solved: "cholesky", "cg" (no factor is formed), or the paper's randomized
            block coordinate descent "rbcd" (epsilon = 0).
        rho: > 0, ADMM's penalty, kept; None starts at 0.03 sqrt(n) and balances the residuals.
        max_iterations: >= 1.
        tolerance: > 0, of both residuals, relative.
        initial: (2, P, d), where to start; None is 0.
        offset: added to each output, the last layer's bias; it is not fitted.
        acceleration: points of Anderson's mixing, taken every fifth iteration and kept where the next step is no
            longer; 0 is the paper's plain iteration.
        generator: of "rbcd"; None is seed 0.

    Returns:
        The solution; `to_module()` is its network.

    Raises:
        ValueError: data, targets or pairs that do not fit, one class alone, a number out of range, or an `epsilon` so
            large that no pattern is constant over the boxes.

    Example:
        >>> from trimtab.optim.solvers import sample_patterns
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
        >>> result = convex_relu(x, x[:, 0].abs(), sample_patterns(x, 10), beta=1e-3)
        >>> network = result.to_module()
        >>> bool((network(x)[:, 0] - x[:, 0].abs()).abs().max() < 0.05), result.duality_gap < 1e-2
        (True, True)
    """
    program = ReLUProgram(X, y, patterns, beta=beta, loss=loss, pairs=pairs, bias=bias, epsilon=epsilon, offset=offset)
    checked_choice("inner", inner, INNER_SOLVERS)
    checked_count("max_iterations", max_iterations)
    checked_number("tolerance", tolerance, above=0)
    if rho is not None:
        checked_number("rho", rho, above=0)
    checked_count("acceleration", acceleration, least=0)
    if inner == "rbcd" and epsilon > 0:
        raise ValueError("`inner` is 'rbcd', which takes epsilon=0")
    if initial is not None and tuple(initial.shape) != program.shape:
        raise ValueError(f"`initial` has shape {tuple(initial.shape)}; takes {program.shape}")
    start = torch.zeros(program.shape, dtype=program.X.dtype, device=program.X.device)
    start = start if initial is None else initial.to(start)
    rho0 = 0.03 * len(X) ** 0.5 if rho is None else rho
    state = ADMM(program, inner, rho0, start, checked_generator(generator), acceleration)
    history, residuals, converged = [], [], False
    for iteration in range(1, max_iterations + 1):
        primal, dual = state.step()
        residuals.append(max(primal, dual))
        history.append(program.objective(state.v))
        if residuals[-1] <= tolerance:
            converged = True
            break
        if epsilon and iteration == 100 and not bool(state.v.any()):
            check_epsilon(program)
        if rho is None and iteration % 20 == 0 and iteration <= max_iterations // 2:
            state.balance(primal, dual)
    u = state.v if epsilon else repaired(program, state.v)
    if epsilon and not bool(u.any()):
        check_epsilon(program)
    bound = -torch.inf if epsilon else dual_bound(program, *state.multipliers())
    return ConvexReLUResult(
        u[0],
        u[1],
        program.objective(u),
        float(bound),
        program.violation(u) if epsilon else 0.0,
        iteration,
        converged,
        history,
        residuals,
        state.v,
        state.inner_iterations,
        bias,
        program.offset,
    )


@dataclass(frozen=True)
class PolishResult:
    """A network before and after.

    Attributes:
        module: the better one by the objective, Linear, ReLU, Linear, in the dtype of the one given.
        before: objective of the network given.
        after: objective of `module`, at most `before`.
        program: the convex solution over the network's patterns.
    """

    module: nn.Sequential
    before: float
    after: float
    program: ConvexReLUResult


@torch.no_grad()
def polish(
    module: nn.Sequential,
    X: Tensor,
    y: Tensor | None,
    *,
    beta: float,
    loss: Literal["squared", "hinge", "logistic"] = "squared",
    pairs: Tensor | None = None,
    max_iterations: int = 2000,
    tolerance: float = 1e-6,
    inner: Literal["cholesky", "cg", "rbcd"] = "cholesky",
    rho: float | None = None,
    acceleration: int = 10,
) -> PolishResult:
    """Moves a trained two-layer network to the optimum over its own neurons' activation patterns.

    Patterns sampled at random can be worse than gradient descent's; those of a trained network are where it already
    is, so the convex program starts from the network, with neurons of one pattern and sign merged, and can only gain
    (our use of arXiv:2201.01965). Where ADMM stopped early at a worse point, the network itself is returned, with its
    layers' norms balanced, which costs the least weight decay.

    Args:
        module: nn.Sequential(Linear, ReLU, Linear) with one output; a bias of the last layer is kept as it is.
        X: (n, d) floating, what it was trained on.
        y: (n,) targets; None with `pairs`.
        beta: > 0, weight decay beta/2 of all weights and the neurons' biases.
        loss: "squared", "hinge" or "logistic".
        pairs: (m, 2) rows of which the first is preferred.
        max_iterations: of ADMM.
        tolerance: of ADMM.
        inner: as in `convex_relu`.
        rho: as in `convex_relu`.
        acceleration: as in `convex_relu`.

    Returns:
        The better network and both objectives.

    Raises:
        ValueError: a network, data or a number that do not fit, or a network without a neuron that is ever active.
    """
    first, last = two_layers(module, X)
    before = relu_objective(module, X, y, beta=beta, loss=loss, pairs=pairs)
    patterns = module_patterns(module, X)
    if not len(patterns):
        raise ValueError("`module` has no neuron that is active on a row of `X`")
    result = convex_relu(
        X,
        y,
        patterns,
        beta=beta,
        loss=loss,
        pairs=pairs,
        bias=first.bias is not None,
        inner=inner,
        rho=rho,
        max_iterations=max_iterations,
        tolerance=tolerance,
        acceleration=acceleration,
        initial=_merged(module, X, patterns),
        offset=0.0 if last.bias is None else last.bias.item(),
    )
    dtype = first.weight.dtype
    candidates = [module, balanced(module, X).to(dtype)]
    candidates += [result.to_module(dtype, repaired=repaired) for repaired in (True, False)]
    scores = [relu_objective(each, X, y, beta=beta, loss=loss, pairs=pairs) for each in candidates]
    best = min(range(len(scores)), key=scores.__getitem__)
    return PolishResult(candidates[best], before, scores[best], result)


def _merged(module: nn.Sequential, X: Tensor, patterns: ActivationPatterns) -> Tensor:
    """The network as a point of the program, (2, P, d): u_j alpha_j, summed over neurons of one pattern and sign."""
    first, last = two_layers(module, X)
    weight = first.weight if first.bias is None else torch.cat([first.weight, first.bias[:, None]], 1)
    weight, alpha = weight.double().to(X.device), last.weight.double()[0].to(X.device)
    rows = X.double() if first.bias is None else torch.cat([X.double(), torch.ones_like(X[:, :1]).double()], 1)
    place = {row.tobytes(): index for index, row in enumerate(patterns.active.cpu().numpy())}
    u = torch.zeros(2, len(patterns), weight.shape[1], dtype=torch.float64, device=X.device)
    for j, row in enumerate((rows @ weight.T >= 0).T.cpu().numpy()):
        if row.any():
            u[int(alpha[j] < 0), place[row.tobytes()]] += weight[j] * alpha[j].abs()
    return u
