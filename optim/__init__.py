"""Solvers and optimizers on tensors and callables; nothing here knows of diffusion pipelines."""

from . import constrained, policy, search, solvers, training
from .constrained import *  # noqa: F403
from .policy import *  # noqa: F403
from .search import *  # noqa: F403
from .solvers import *  # noqa: F403
from .training import *  # noqa: F403

__all__ = sorted(
    [
        *constrained.__all__,
        *policy.__all__,
        *search.__all__,
        *solvers.__all__,
        *training.__all__,
    ]
)
