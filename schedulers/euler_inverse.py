"""Euler's method from the sample to the noise."""

from .base import FlowMatchSolver

__all__ = ["FlowMatchEulerInverseScheduler"]


class FlowMatchEulerInverseScheduler(FlowMatchSolver):
    """ODE inversion: Euler's steps along the stock schedule from 0 to its noisy end.

    From node s to the next higher one s': x <- x + (s' - s) v(x, s). N calls of the network, the first at 0. Going
    back with `FlowMatchEulerDiscreteScheduler` misses the start by O(1/N): each velocity is taken at the other end of
    its step. Known as DDIM inversion (Song et al., arXiv 2010.02502) in the parametrization of diffusion models, for
    which Diffusers has `DDIMInverseScheduler`.

    Args:
        as for `FlowMatchEulerDiscreteScheduler`; `from_config(pipe.scheduler.config)` takes a pipeline's.

    Example:
        >>> scheduler = FlowMatchEulerInverseScheduler(shift=3.0)
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
        >>> scheduler.sigmas.tolist()
        [0.0, 0.75, 1.0]
        >>> scheduler.timesteps.tolist()
        [0.0, 750.0]
    """

    inverse = True
