"""How far a point of the convex ReLU program is from its optimum: a feasible primal point and a feasible dual one."""

from __future__ import annotations

import torch
from torch import Tensor

from .relu_program import ReLUProgram

__all__ = ["check_epsilon", "dual_bound", "repaired"]


def repaired(program: ReLUProgram, u: Tensor) -> Tensor:
    """u moved into its cones along each pattern's own normal h_i, by just as much as its worst row needs.

    Blocks that are 0 stay so. A block whose violation no multiple of h_i undoes (h_i lies on that wall) is shortened to
    0, which is feasible. Plain forms only: a normal need not lie in the robust cones.

    Args:
        program: the program.
        u: (2, P, d).

    Returns:
        (2, P, d), in all cones but for rounding.
    """
    normals = program.patterns.normals.to(u)
    normals = normals / normals.norm(dim=1, keepdim=True)
    inside = (program.signs * (normals @ program.X.T))[None]
    needed = -program.cones(u)
    rounding = 1e-14 * program.X.norm(dim=1) * u.norm(dim=2, keepdim=True)
    violated = needed > rounding
    steps = torch.where(violated, needed / inside.clamp_min(0), 0).amax(2)
    moved = u + steps[..., None].nan_to_num(posinf=0.0) * normals
    return torch.where((torch.isfinite(steps) & (u.norm(dim=2) > 0))[..., None], moved, 0)


def dual_bound(program: ReLUProgram, theta: Tensor, nu: Tensor, steps: int = 50) -> float:
    """A lower bound of the optimum over these patterns, by a dual point theta (m,) made feasible by scaling.

    The dual is max_theta -l*(theta) subject to max {+-theta^T F_i h : ||h|| <= 1, G_i h >= 0} <= beta for each pattern
    (arXiv:2201.01965; Pilanci and Ergen, 2020). That maximum is min_{gamma >= 0} ||F_i^T theta -+ G_i^T gamma||, and
    any gamma gives an upper bound of it, so any theta gives a true bound here. The gammas start from ADMM's and take
    accelerated projected gradient steps.

    Args:
        program: the plain form.
        theta: (m,), a subgradient of the loss in the outputs.
        nu: (2, P, n), ADMM's multipliers of the cones, >= 0.
        steps: refining gamma.

    Returns:
        -l*(t theta) with the largest t <= 1 that is feasible; -inf where that is not finite.
    """
    pull = program.outputs_adjoint(theta)
    g = torch.stack([pull, -pull])  # what -G^T gamma is to cancel: minimize ||g - G^T gamma||
    length = 1 / float(torch.linalg.matrix_norm(program.X, 2)) ** 2
    gamma = ahead = nu.clamp_min(0)
    best = (g - program.cones_adjoint(gamma)).norm(dim=2)
    t = 1.0
    for _ in range(steps):
        new = (ahead + length * program.cones(g - program.cones_adjoint(ahead))).clamp_min(0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        gamma, ahead, t = new, new + (t - 1) / t_new * (new - gamma), t_new
        best = torch.minimum(best, (g - program.cones_adjoint(gamma)).norm(dim=2))
    scale = (program.beta / best.max().clamp_min(1e-300)).clamp_max(1)
    value = -program.loss.conjugate(scale * theta, program.y) + scale * theta * program.offset
    return float(value.sum().nan_to_num(nan=-torch.inf))


def check_epsilon(program: ReLUProgram) -> None:
    """Raises ValueError where every pattern's cone is 0, with the largest epsilon at which one is not."""
    import numpy as np
    from scipy.optimize import linprog

    X, columns = program.X.cpu().numpy(), program.columns
    rows, width = X.shape
    largest = 0.0
    for signs in program.signs.cpu().numpy():
        # max t such that every signed row times (a - b) is >= t, with a, b >= 0 and sum over features of a + b <= 1
        sides = signs[:, None] * X
        A = np.zeros((rows + 1, 2 * width + 1))
        A[:rows, :width], A[:rows, width : 2 * width], A[:rows, -1] = -sides, sides, 1
        A[rows, :columns] = A[rows, width : width + columns] = 1
        cost = np.zeros(2 * width + 1)
        cost[-1] = -1
        limit = np.r_[np.zeros(rows), 1.0]
        bounds = [(0, 1e6)] * (2 * width) + [(None, None)]
        found = linprog(cost, A_ub=A, b_ub=limit, bounds=bounds, method="highs")
        largest = max(largest, -float(found.fun) if found.status == 0 else 0.0)
    if largest <= program.epsilon:
        raise ValueError(
            f"`epsilon` is {program.epsilon:g}; no pattern is constant over boxes larger than {largest:.3g} around all "
            "rows: take less, or other patterns"
        )
