"""Diagnostics: curvature, paths between solutions, what attention selects, how well classes can be told apart."""

from .attention_descent import AttentionDescent, attention_descent
from .attention_margin import HeadMargin, SelectionReport, attention_margin, selection_margin
from .attention_svm import AttentionSVM, MultiTokenSVM, attention_svm, attention_svm_multi, svm_correlation
from .bayes_error import (
    BayesErrorReport,
    bayes_error,
    bayes_error_report,
    label_bandwidth,
    mixture_lower_bound,
)
from .hessian import SpectrumResult, count_outliers, hessian_spectrum, hutchinson_trace
from .lanczos import EigenResult, LanczosResult, lanczos, top_eigenpairs
from .operators import SymmetricOperator, data_hessian_operator, hessian_operator
from .paths import PathResult, interpolate_loss
from .pictures import margin_picture, spectrum_picture

__all__ = [
    "AttentionDescent",
    "attention_descent",
    "HeadMargin",
    "SelectionReport",
    "attention_margin",
    "selection_margin",
    "AttentionSVM",
    "MultiTokenSVM",
    "attention_svm",
    "attention_svm_multi",
    "svm_correlation",
    "margin_picture",
    "BayesErrorReport",
    "bayes_error",
    "bayes_error_report",
    "label_bandwidth",
    "mixture_lower_bound",
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
