"""Schedulers that run a flow backwards or at higher order; each takes the place of a stock pipeline's own."""

from .euler_inverse import FlowMatchEulerInverseScheduler
from .fire_flow import FlowMatchFireFlowInverseScheduler, FlowMatchFireFlowScheduler
from .midpoint import FlowMatchMidpointInverseScheduler, FlowMatchMidpointScheduler
from .stochastic_flow import FlowMatchStochasticScheduler, FlowTransition, flow_transition
from .tail import start_at
from .uni_inv import FlowMatchUniInvScheduler

__all__ = [
    "FlowMatchEulerInverseScheduler",
    "FlowMatchFireFlowInverseScheduler",
    "FlowMatchFireFlowScheduler",
    "FlowMatchMidpointInverseScheduler",
    "FlowMatchMidpointScheduler",
    "FlowMatchStochasticScheduler",
    "FlowMatchUniInvScheduler",
    "FlowTransition",
    "flow_transition",
    "start_at",
]
