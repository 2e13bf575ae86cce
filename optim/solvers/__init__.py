"""Solvers: plain functions on tensors and callables."""

from .activation_patterns import (
    ActivationPatterns,
    enumerate_patterns,
    improvement_bound,
    module_patterns,
    sample_patterns,
)
from .blind_gain import CalibrationResult, calibrate_gains, gain_step, project_gains
from .conjugate_directions import LinearSolveResult, conjugate_directions
from .convex_relu import PolishResult, convex_relu, polish
from .direction_net import DeepDirections, DirectionNet, direction_loss, ritz_pairs, ritz_right_hand_sides
from .fixed_point import FixedPointState, fixed_point
from .grid_poisson import GridPoisson, Multigrid
from .hessian_approximations import fisher_hessian, gauss_newton_hessian, logsumexp_hessian
from .linear_heads import LinearHead, fit_linear_head, fit_preference_head
from .newton import NewtonResult, NewtonStep, gradient_normalized_newton
from .preconditioners import block_deflation, incomplete_cholesky, sparse_matvec
from .relu_features import SampledReLUResult, sampled_convex_relu
from .relu_program import ConvexReLUResult, relu_objective
from .step_size import StepSizeReport, estimate_step_size

__all__ = [
    "ritz_right_hand_sides",
    "ritz_pairs",
    "direction_loss",
    "DirectionNet",
    "DeepDirections",
    "project_gains",
    "gain_step",
    "calibrate_gains",
    "CalibrationResult",
    "sparse_matvec",
    "incomplete_cholesky",
    "block_deflation",
    "Multigrid",
    "GridPoisson",
    "fit_preference_head",
    "fit_linear_head",
    "LinearHead",
    "logsumexp_hessian",
    "gauss_newton_hessian",
    "fisher_hessian",
    "gradient_normalized_newton",
    "NewtonStep",
    "NewtonResult",
    "ActivationPatterns",
    "ConvexReLUResult",
    "FixedPointState",
    "LinearSolveResult",
    "PolishResult",
    "SampledReLUResult",
    "StepSizeReport",
    "conjugate_directions",
    "convex_relu",
    "enumerate_patterns",
    "estimate_step_size",
    "fixed_point",
    "improvement_bound",
    "module_patterns",
    "polish",
    "relu_objective",
    "sample_patterns",
    "sampled_convex_relu",
]
