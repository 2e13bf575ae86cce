"""ShapeNet and ModelNet40 in their usual layouts; neither may be redistributed, so none comes with this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trimtab.geometry import load_point_cloud, normalize_cloud

__all__ = ["load_modelnet", "load_shapenet"]


def load_shapenet(
    folder: str | Path, *, split: str | None = "train", num_points: int = 2048, seed: int = 0
) -> tuple[Tensor, Tensor, list[str]]:
    """Clouds of ShapeNet Core.

    Layouts: ``<synset>/<split>/<model>.npy`` of (15000, 3) points (the PC15k files of PointFlow);
    ``<synset>/<model>/models/model_normalized.obj`` (ShapeNetCore.v2), which has no splits: pass ``split=None``; and a
    ``.npz`` file with ``data`` (M, N, 3) and perhaps ``label``.

    Args:
        folder: the data set's folder, or the ``.npz`` file.
        split: ``"train"``, ``"val"`` or ``"test"``; None takes all.
        num_points: of each cloud, drawn at random.
        seed: of that choice.

    Returns:
        clouds (M, num_points, 3), centred and of unit radius; labels (M,) int64; and the classes' names.

    Raises:
        FileNotFoundError: there is no such folder, or no cloud in it.
        ValueError: a file cannot be read.
    """
    folder = Path(folder)
    if folder.is_file():
        return _arrays([folder], num_points, seed)
    patterns = ["*/*.npy", "*/*/models/*.obj"] if split is None else [f"*/{split}/*.npy"]
    patterns += ["*/*/*.npy"] if split is None else []
    return _files(folder, patterns, num_points, seed)


def load_modelnet(
    folder: str | Path, *, split: str | None = "train", num_points: int = 2048, seed: int = 0
) -> tuple[Tensor, Tensor, list[str]]:
    """Clouds of ModelNet40 (or 10).

    Layouts: ``ply_data_<split>*.h5`` with ``data`` (M, 2048, 3) and ``label`` (modelnet40_ply_hdf5_2048; the names are
    in ``shape_names.txt``); ``<class>/<split>/<model>.off`` (ModelNet40); and ``<class>/<model>.txt`` with the models
    of a split listed in ``modelnet40_<split>.txt`` (modelnet40_normal_resampled).

    Args:
        folder: the data set's folder.
        split: ``"train"`` or ``"test"``; None takes all.
        num_points: of each cloud, drawn at random.
        seed: of that choice.

    Returns:
        as :func:`load_shapenet`.

    Raises:
        FileNotFoundError: there is no such folder, or no cloud in it.
        ValueError: a file cannot be read.
        ImportError: h5py is needed and not installed.
    """
    folder = Path(folder)
    if packed := sorted(folder.glob(f"*{split or ''}*.h5")):
        clouds, labels, _ = _arrays(packed, num_points, seed)
        names = folder / "shape_names.txt"
        known = names.read_text(encoding="utf-8").split() if names.is_file() else []
        return clouds, labels, known or [str(i) for i in range(int(labels.max()) + 1)]
    lists = sorted(folder.glob(f"modelnet*_{split or '*'}.txt"))
    if lists:
        wanted = {line for path in lists for line in path.read_text(encoding="utf-8").split()}
        return _files(folder, ["*/*.txt"], num_points, seed, wanted)
    return _files(folder, [f"*/{split or '*'}/*.off"], num_points, seed)


def _files(
    folder: Path, patterns: list[str], num_points: int, seed: int, wanted: set[str] | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if wanted is not None:
        paths = [path for path in paths if path.stem in wanted]
    if not paths:
        raise FileNotFoundError(f"no clouds in {folder}: nothing there is named {' or '.join(patterns)}")
    classes = sorted({path.relative_to(folder).parts[0] for path in paths})
    generator = torch.Generator().manual_seed(seed)
    clouds = [_sized(load_point_cloud(path, num_points=num_points, generator=generator), num_points) for path in paths]
    labels = [classes.index(path.relative_to(folder).parts[0]) for path in paths]
    return normalize_cloud(torch.stack(clouds))[0], torch.tensor(labels), classes


def _arrays(paths: list[Path], num_points: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    clouds, labels = [], []
    for path in paths:
        found = _read_arrays(path)
        data = np.asarray(found["data"], np.float32)
        if data.ndim != 3 or data.shape[-1] != 3:
            raise ValueError(f"{path}: `data` must have shape (M, N, 3), got {data.shape}")
        clouds.append(torch.from_numpy(data))
        labels.append(
            torch.from_numpy(np.asarray(found.get("label", np.zeros(len(data)))).reshape(-1).astype(np.int64))
        )
    every, label = torch.cat(clouds), torch.cat(labels)
    if every.shape[1] > num_points:
        chosen = torch.randperm(every.shape[1], generator=torch.Generator().manual_seed(seed))[:num_points]
        every = every[:, chosen]
    return normalize_cloud(every)[0], label, [str(i) for i in range(int(label.max()) + 1)]


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".h5":
        try:
            import h5py
        except ImportError:
            raise ImportError("HDF5 files need h5py: pip install 'trimtab[geometry]'") from None
        opener = h5py.File(path, "r")
    else:
        opener = np.load(path, allow_pickle=False)
    with opener as file:
        found = {name: np.asarray(file[name]) for name in ("data", "label") if name in file}
    if "data" not in found:
        raise ValueError(f"{path} has no array `data`")
    return found


def _sized(cloud: Tensor, num_points: int) -> Tensor:
    """A cloud with too few points gets its first ones again."""
    return cloud if len(cloud) == num_points else cloud[torch.arange(num_points) % len(cloud)]
