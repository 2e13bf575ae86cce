"""Searches: a class with ask, tell and state_dict, and a function that loops it."""

from .consensus import ConsensusBasedOptimization, consensus_based_optimization, contraction_factor
from .consensus_hopping import ConsensusHopping, consensus_hopping
from .consensus_weights import alpha_for_ess, consensus_point
from .covering import covering_direct_search
from .direct_search import DirectSearch
from .directional import directional_attack, maximize_with_attacks
from .domains import Ball, Box, Domain, Simplex
from .dynamic_mirror_descent import DynamicMirrorDescent
from .mirror_descent import OptimisticMirrorDescent
from .polling import DirectSearchResult
from .saddle import RegretTracker, SaddleResult, solve_saddle
from .sampling import SearchResult

__all__ = [
    "Ball",
    "Box",
    "ConsensusBasedOptimization",
    "ConsensusHopping",
    "DirectSearch",
    "DirectSearchResult",
    "Domain",
    "DynamicMirrorDescent",
    "OptimisticMirrorDescent",
    "RegretTracker",
    "SaddleResult",
    "SearchResult",
    "Simplex",
    "alpha_for_ess",
    "consensus_based_optimization",
    "consensus_hopping",
    "consensus_point",
    "contraction_factor",
    "covering_direct_search",
    "directional_attack",
    "maximize_with_attacks",
    "solve_saddle",
]
