"""Solvers and optimizers on tensors and callables; nothing here knows of diffusion pipelines."""

from .solvers import FixedPointState, StepSizeReport, estimate_step_size, fixed_point

__all__ = ["FixedPointState", "StepSizeReport", "estimate_step_size", "fixed_point"]
