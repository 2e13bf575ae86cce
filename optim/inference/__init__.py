"""Programmable variational inference: objectives as programs, compiled to unbiased surrogate losses."""

from .estimator import Estimate, estimate
from .mixture import MixtureFit, MixtureGuide, fit_mixture, spread_starts
from .objectives import Marginal, Normalized, elbo, iwelbo, p_wake, q_wake
from .program import check_reparam, log_density, observe, sample, simulate

__all__ = [
    "Estimate",
    "Marginal",
    "MixtureFit",
    "MixtureGuide",
    "Normalized",
    "check_reparam",
    "elbo",
    "estimate",
    "fit_mixture",
    "iwelbo",
    "log_density",
    "observe",
    "p_wake",
    "q_wake",
    "sample",
    "simulate",
    "spread_starts",
]
