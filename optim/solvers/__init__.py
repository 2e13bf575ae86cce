"""Solvers: plain functions on tensors and callables."""

from .fixed_point import FixedPointState, fixed_point
from .step_size import StepSizeReport, estimate_step_size

__all__ = ["FixedPointState", "StepSizeReport", "estimate_step_size", "fixed_point"]
