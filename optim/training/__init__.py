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
from .target_surrogate import SurrogateStep, TargetSurrogate

__all__ = [
    "AdaGradNorm",
    "AdaptiveBatchSampler",
    "AdaptiveBatchSize",
    "BatchTest",
    "SurrogateStep",
    "TargetSurrogate",
    "augmented_inner_product_test",
    "coordinate_norm_test",
    "inner_product_test",
    "norm_test",
    "norm_test_from_microbatches",
    "per_sample_grads",
]
