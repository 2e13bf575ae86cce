"""Searches: a class with ask, tell and state_dict, and a function that loops it."""

from .consensus import ConsensusBasedOptimization, consensus_based_optimization, contraction_factor
from .consensus_hopping import ConsensusHopping, consensus_hopping
from .consensus_weights import alpha_for_ess, consensus_point
from .covering import covering_direct_search
from .direct_search import DirectSearch
from .directional import directional_attack, maximize_with_attacks
from .polling import DirectSearchResult
from .sampling import SearchResult

__all__ = [
    "ConsensusBasedOptimization",
    "ConsensusHopping",
    "DirectSearch",
    "DirectSearchResult",
    "SearchResult",
    "alpha_for_ess",
    "consensus_based_optimization",
    "consensus_hopping",
    "consensus_point",
    "contraction_factor",
    "covering_direct_search",
    "directional_attack",
    "maximize_with_attacks",
]
