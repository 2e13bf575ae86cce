"""Solvers and optimizers on tensors and callables; nothing here knows of diffusion pipelines."""

from . import analysis, constrained, inference, policy, protect, search, solvers, training
from .analysis import *  # noqa: F403
from .constrained import *  # noqa: F403
from .inference import *  # noqa: F403
from .policy import *  # noqa: F403
from .protect import *  # noqa: F403
from .search import *  # noqa: F403
from .solvers import *  # noqa: F403
from .training import *  # noqa: F403

__all__ = sorted(
    [
        *analysis.__all__,
        *constrained.__all__,
        *inference.__all__,
        *policy.__all__,
        *protect.__all__,
        *search.__all__,
        *solvers.__all__,
        *training.__all__,
    ]
)
