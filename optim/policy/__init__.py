"""Policy gradients: they see log-probabilities and rewards only, and work on any torch policy."""

from .advantages import RewardThreshold, RunningRewardStats, group_advantages, leave_one_out_advantage
from .log_probs import gaussian_log_prob, policy_gradient_surrogate, policy_hvp
from .normalized import HARPG, NormalizedPGIGT

__all__ = [
    "HARPG",
    "NormalizedPGIGT",
    "RewardThreshold",
    "RunningRewardStats",
    "gaussian_log_prob",
    "group_advantages",
    "leave_one_out_advantage",
    "policy_gradient_surrogate",
    "policy_hvp",
]
