"""Constrained solvers: plain functions on tensors and callables."""

from .augmented_lagrangian import AugmentedLagrangianSQP, ConstrainedResult, minimize_equality
from .bilevel import LVHBA, BilevelProblem, BilevelResult, lv_hba
from .first_order import FirstOrderSQP
from .merit import exact_augmented_lagrangian
from .minres import minres
from .reward_weights import TunedWeights, tune_reward_weights
from .sketching import sketch_project

__all__ = [
    "LVHBA",
    "AugmentedLagrangianSQP",
    "BilevelProblem",
    "BilevelResult",
    "ConstrainedResult",
    "FirstOrderSQP",
    "TunedWeights",
    "exact_augmented_lagrangian",
    "lv_hba",
    "minimize_equality",
    "minres",
    "sketch_project",
    "tune_reward_weights",
]
