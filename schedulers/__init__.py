"""Schedulers that run a flow backwards or at higher order; each takes the place of a stock pipeline's own."""

from .euler_inverse import FlowMatchEulerInverseScheduler
from .tail import start_at

__all__ = ["FlowMatchEulerInverseScheduler", "start_at"]
