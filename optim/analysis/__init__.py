"""Diagnostics: curvature of losses and rewards, paths between solutions."""

from .hessian import SpectrumResult, count_outliers, hessian_spectrum, hutchinson_trace
from .lanczos import EigenResult, LanczosResult, lanczos, top_eigenpairs
from .operators import SymmetricOperator, data_hessian_operator, hessian_operator
from .paths import PathResult, interpolate_loss
from .pictures import spectrum_picture

__all__ = [
    "EigenResult",
    "LanczosResult",
    "PathResult",
    "SpectrumResult",
    "SymmetricOperator",
    "count_outliers",
    "data_hessian_operator",
    "hessian_operator",
    "hessian_spectrum",
    "hutchinson_trace",
    "interpolate_loss",
    "lanczos",
    "spectrum_picture",
    "top_eigenpairs",
]
