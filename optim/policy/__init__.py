"""Policy gradients: they see log-probabilities and rewards only, and work on any torch policy."""

from .advantages import RewardThreshold, RunningRewardStats, group_advantages, leave_one_out_advantage
from .exploration import ShapedRewards, exploration_score, gradient_guided_advantages, gradient_guided_rewards
from .gradient_features import LastLayerFeature, last_layer_gradient, token_sensitivity
from .hybrid import HybridGate, HybridLoss, hybrid_loss
from .log_probs import gaussian_log_prob, policy_gradient_surrogate, policy_hvp
from .normalized import HARPG, NormalizedPGIGT
from .unified import UnifiedLoss, stability_mask, unified_policy_loss

__all__ = [
    "HARPG",
    "HybridGate",
    "HybridLoss",
    "LastLayerFeature",
    "NormalizedPGIGT",
    "RewardThreshold",
    "RunningRewardStats",
    "ShapedRewards",
    "UnifiedLoss",
    "exploration_score",
    "gaussian_log_prob",
    "gradient_guided_advantages",
    "gradient_guided_rewards",
    "group_advantages",
    "hybrid_loss",
    "last_layer_gradient",
    "leave_one_out_advantage",
    "policy_gradient_surrogate",
    "policy_hvp",
    "stability_mask",
    "token_sensitivity",
    "unified_policy_loss",
]
