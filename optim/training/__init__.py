"""Training optimizers: subclasses of ``torch.optim.Optimizer`` and what steers them."""

from .adagrad_norm import AdaGradNorm
from .adaptive_batch import AdaptiveBatchSampler, AdaptiveBatchSize
from .batch_tests import (
    BatchTest,
    augmented_inner_product_test,
    coordinate_norm_test,
    inner_product_test,
    norm_test,
    norm_test_from_microbatches,
    per_sample_grads,
)
from .biases import PowerProp, apply_powerprop, magnitude_prune_, preconditioned_optimizer, remove_powerprop
from .solution_report import (
    ForgettingReport,
    SolutionReport,
    class_similarity,
    collect_features,
    effective_rank,
    forgetting_report,
    solution_report,
)
from .target_surrogate import SurrogateStep, TargetSurrogate

__all__ = [
    "AdaGradNorm",
    "AdaptiveBatchSampler",
    "AdaptiveBatchSize",
    "BatchTest",
    "ForgettingReport",
    "PowerProp",
    "SolutionReport",
    "SurrogateStep",
    "TargetSurrogate",
    "apply_powerprop",
    "augmented_inner_product_test",
    "class_similarity",
    "collect_features",
    "coordinate_norm_test",
    "effective_rank",
    "forgetting_report",
    "inner_product_test",
    "magnitude_prune_",
    "norm_test",
    "norm_test_from_microbatches",
    "per_sample_grads",
    "preconditioned_optimizer",
    "remove_powerprop",
    "solution_report",
]
