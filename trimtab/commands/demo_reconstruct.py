"""The part of ``trimtab demo`` that reconstructs a point cloud."""

from pathlib import Path

__all__ = ["demo_reconstruct"]

SHAPE, NUMBER = "chair", 1


def demo_reconstruct(folder: Path) -> Path:
    """Reconstructs a chair that training never saw and writes ``chair-reconstruction``: a cloud, picture and turntable.

    Args:
        folder: where to; it exists.

    Returns:
        The turntable, the chair on the left and its reconstruction on the right.
    """
    from trimtab.assets import asset_path
    from trimtab.commands.reconstruct import BUNDLED, write_reconstruction
    from trimtab.geometry import PointCloudReconstructionPipeline, save_point_cloud
    from trimtab.recipes.point_clouds import draw_cloud

    pipe = PointCloudReconstructionPipeline.from_pretrained(asset_path(BUNDLED))
    chair = draw_cloud(SHAPE, NUMBER, pipe.autoencoder.config.num_points, test=True)
    save_point_cloud(chair, folder / f"{SHAPE}.ply")
    output = pipe(chair)
    path = folder / f"{SHAPE}-reconstruction.ply"
    made_by = {name: value.item() for name, value in output.distances.items()}
    write_reconstruction(chair, output.clouds[0], path, made_by, size=240)
    return path.with_suffix(".gif")
