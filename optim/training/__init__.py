"""Training optimizers: subclasses of ``torch.optim.Optimizer`` and what steers them."""

from .adagrad_norm import AdaGradNorm
from .adaptive_batch import AdaptiveBatchSampler, AdaptiveBatchSize
from .batch_criteria import (
    BatchTest,
    augmented_inner_product_test,
    coordinate_norm_test,
    inner_product_test,
    norm_test,
    norm_test_from_microbatches,
    per_sample_grads,
)
from .biases import PowerProp, apply_powerprop, magnitude_prune_, preconditioned_optimizer, remove_powerprop
from .dct import ColumnSelection, dct2_rows, dct_matrix, project_back, select_columns
from .dct_lowrank import DCTAdamW
from .dual_norms import dual_norm
from .frugal import Frugal
from .lanton import Lanton
from .param_groups import frugal_param_groups, lanton_param_groups
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
from .trion import Trion

__all__ = [
    "AdaGradNorm",
    "AdaptiveBatchSampler",
    "AdaptiveBatchSize",
    "BatchTest",
    "ColumnSelection",
    "DCTAdamW",
    "ForgettingReport",
    "Frugal",
    "Lanton",
    "PowerProp",
    "SolutionReport",
    "SurrogateStep",
    "TargetSurrogate",
    "Trion",
    "apply_powerprop",
    "augmented_inner_product_test",
    "class_similarity",
    "collect_features",
    "coordinate_norm_test",
    "dct2_rows",
    "dct_matrix",
    "dual_norm",
    "effective_rank",
    "forgetting_report",
    "frugal_param_groups",
    "inner_product_test",
    "lanton_param_groups",
    "magnitude_prune_",
    "norm_test",
    "norm_test_from_microbatches",
    "per_sample_grads",
    "preconditioned_optimizer",
    "project_back",
    "remove_powerprop",
    "select_columns",
    "solution_report",
]
