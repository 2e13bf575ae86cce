"""Distances between point clouds, and a model that reconstructs clouds under them."""

from .amortized import AmortizedSlicedWasserstein
from .autoencoder import PointCloudAutoencoder
from .chamfer import chamfer_distance
from .directions import sample_directions
from .io import load_point_cloud, normalize_cloud, save_point_cloud
from .latent_flow import LatentFlow
from .meshes import sample_surface
from .one_dimensional import wasserstein_1d
from .optimal_transport import earth_movers_distance, sinkhorn_divergence
from .optimized_slices import distributional_sliced_wasserstein, max_sliced_wasserstein
from .refinement import REFINEMENT_LOSSES, refine_latents
from .rendering import render_point_cloud, save_turntable, turntable
from .sliced_wasserstein import SlicedTarget, sliced_wasserstein
from .slicers import AmortizedSlicer
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "REFINEMENT_LOSSES",
    "AmortizedSlicedWasserstein",
    "AmortizedSlicer",
    "LatentFlow",
    "PointCloudAutoencoder",
    "PointCloudReconstructionPipeline",
    "SlicedTarget",
    "VonMisesFisher",
    "chamfer_distance",
    "distributional_sliced_wasserstein",
    "earth_movers_distance",
    "load_point_cloud",
    "max_sliced_wasserstein",
    "normalize_cloud",
    "refine_latents",
    "render_point_cloud",
    "sample_directions",
    "sample_surface",
    "save_point_cloud",
    "save_turntable",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "turntable",
    "wasserstein_1d",
]


def __getattr__(name: str) -> object:
    """Imports the pipeline, which imports this package, on first use (PEP 562)."""
    if name != "PointCloudReconstructionPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trimtab.pipelines.point_cloud import PointCloudReconstructionPipeline

    return PointCloudReconstructionPipeline
