"""Point clouds from files, meshes and arrays, and back into files."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .clouds import check_cloud
from .meshes import sample_surface

__all__ = ["READABLE", "WRITABLE", "load_point_cloud", "normalize_cloud", "save_point_cloud"]

_MESHES = (".ply", ".obj", ".stl", ".glb", ".gltf", ".off")
_ARRAYS = (".npz", ".npy")
_TEXTS = (".xyz", ".txt", ".pts", ".csv")
READABLE = (*_MESHES, *_ARRAYS, *_TEXTS)
"""Endings that :func:`load_point_cloud` takes."""
_CLOUD_KEYS = ("points", "vertices", "data", "pos", "cloud", "arr_0")
_MAX_POINTS = 1_000_000
_MAX_BYTES = 2**31  # of an unpacked array: some kilobytes may hold gigabytes of zeros
_MAX_FACES = 10_000_000  # of all nodes of a scene: a small file may show one mesh a million times


def load_point_cloud(source: Any, *, num_points: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The points of a file, a mesh or an array.

    Points on a mesh are uniform by area. A mesh without faces gives its vertices. Of a cloud with more than
    ``num_points`` points, that many are drawn without replacement; a smaller one stays as it is. No file is unpickled
    and none is fetched from a network.

    Args:
        source: the path of a PLY, OBJ, STL, GLB, glTF or OFF file (these need trimesh), of an NPZ or NPY array, or of
            a text file of numbers (XYZ, TXT, PTS, CSV), three or more a line; a ``trimesh`` mesh, scene or cloud; an
            array or tensor (N, 3).
        num_points: how many; None is 2,048 from a mesh and all of a cloud, at most a million.
        generator: of the random choice, on the CPU; None always makes the same one.

    Returns:
        (N, 3) float32 on the CPU, finite.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a source of another type.
        ValueError: an unknown ending, a file that cannot be read as what it says, a mesh without area, or points that
            are not (N, 3), are none, or are not finite.
        ImportError: trimesh is needed and not installed.

    Warns:
        UserWarning: the cloud has more than a million points, of which some were drawn.
    """
    if num_points is not None and (not isinstance(num_points, int) or num_points < 1):
        raise ValueError(f"`num_points` must be None or a whole number >= 1, got {num_points!r}")
    name = "source"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        name = str(path)
        source = _read(path)
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    rng = np.random.default_rng(seed)
    points, faces = _points_and_faces(source)
    try:
        if faces is not None and len(faces):
            return torch.from_numpy(sample_surface(points, faces, num_points or 2048, rng))
        if points.ndim == 3 and len(points) == 1:
            points = points[0]
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"points must have shape (N, 3), got {points.shape}")
        limit = num_points or _MAX_POINTS
        if len(points) > limit:
            if len(points) > _MAX_POINTS:
                warnings.warn(f"{name} has {len(points):,} points; {limit:,} of them are used", stacklevel=2)
            points = points[np.sort(rng.choice(len(points), limit, replace=False))]
        with np.errstate(over="ignore"):  # what is too large is infinite then, and told to be
            cloud = torch.from_numpy(np.ascontiguousarray(points, np.float32))
        check_cloud(cloud, "points")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return cloud


def _points_and_faces(source: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(source, Tensor):
        source = source.detach().float().cpu().numpy()
    if isinstance(source, (np.ndarray, list, tuple)):
        points = np.asarray(source)
        if points.dtype.kind not in "fiu":
            raise TypeError(f"`source` must hold numbers, got an array of {points.dtype}")
        return points, None
    if hasattr(source, "to_mesh"):  # a scene: all its meshes, in place
        source = source.to_mesh() if len(getattr(source, "geometry", ())) else source
    if hasattr(source, "vertices"):
        return np.asarray(source.vertices), getattr(source, "faces", None)
    wanted = "a path, a trimesh mesh or cloud, or an array (N, 3)"
    raise TypeError(f"`source` must be {wanted}, got {type(source).__name__}")


def _read(path: Path) -> Any:
    ending = path.suffix.lower()
    if ending not in READABLE:
        raise ValueError(f"{path}: a point cloud is read from {', '.join(READABLE)}, got {ending or 'no ending'!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if ending in _MESHES:
        trimesh = _trimesh()
    try:
        if ending in _TEXTS:
            return _read_text(path)
        if ending in _ARRAYS:
            return _read_array(path)
        return _read_mesh(trimesh, path)
    except Exception as error:  # parsers of broken files raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} cannot be read as {ending[1:].upper()}: {reason}") from error


def _read_mesh(trimesh: ModuleType, path: Path) -> Any:
    if path.suffix.lower() == ".gltf":  # its numbers lie in files beside it
        scene = trimesh.load_scene(path)
    else:  # from memory, so that what a file names beside it is not opened
        scene = trimesh.load_scene(io.BytesIO(path.read_bytes()), file_type=path.suffix[1:].lower())
    parts = list(scene.geometry.values())
    if not parts:
        raise ValueError("it holds no points")
    if any(len(getattr(part, "faces", ())) for part in parts):
        shown = [scene.geometry[scene.graph[node][1]] for node in scene.graph.nodes_geometry]
        if (faces := sum(len(getattr(part, "faces", ())) for part in shown)) > _MAX_FACES:
            raise ValueError(f"its nodes show {faces:,} faces; {_MAX_FACES:,} are taken")
        return scene.to_mesh()
    clouds = [part.vertices for part in parts if len(getattr(part, "vertices", ()))]
    return np.concatenate(clouds)


def _read_array(path: Path) -> Any:
    with path.open("rb") as file:  # numpy leaves what it opens itself open where the file is broken
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        if large := [info.filename for info in found.zip.infolist() if info.file_size > _MAX_BYTES]:
            raise ValueError(f"{large[0][:80]} would be more than {_MAX_BYTES:,} bytes")
        names = list(found)
        key = next((key for key in _CLOUD_KEYS if key in names), names[0] if len(names) == 1 else None)
        if key is None:
            raise ValueError(f"it has no array named {' or '.join(_CLOUD_KEYS)}, but {', '.join(names)}")
        if key == "vertices" and "faces" in names:
            return _Mesh(found[key], found["faces"])
        return found[key]


class _Mesh:
    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        self.vertices, self.faces = vertices, faces


def _read_text(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8") as file:
        first = next((line for line in file if line.strip() and not line.startswith("#")), "")
    delimiter = "," if "," in first else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty file is told below
        points = np.loadtxt(path, dtype=np.float64, delimiter=delimiter, ndmin=2, encoding="utf-8")
    if points.size == 0:
        raise ValueError("it holds no points")
    if points.shape[1] < 3:
        raise ValueError(f"it has {points.shape[1]} numbers a line; three or more are taken")
    return points[:, :3]


def save_point_cloud(cloud: Tensor | np.ndarray, path: str | os.PathLike[str]) -> None:
    """Writes a cloud, under a temporary name first.

    Args:
        cloud: (N, 3), finite.
        path: ends in ``.ply`` (binary), ``.obj``, ``.xyz``, ``.npz``, ``.npy``, or ``.glb`` (which needs trimesh).

    Raises:
        TypeError, ValueError: not such a cloud, or another ending.
        ImportError: trimesh is needed and not installed.
    """
    path = Path(path).expanduser()
    write = WRITABLE.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"`path` must end in {', '.join(WRITABLE)}, got {path.name!r}")
    points = torch.as_tensor(cloud).detach().cpu()
    check_cloud(points, "cloud")
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"`cloud` must have shape (N, 3), got {tuple(points.shape)}")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # numpy adds an ending where it misses one
    try:
        write(points.float().numpy(), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_ply(points: np.ndarray, path: Path) -> None:
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    path.write_bytes(header.encode() + points.astype("<f4").tobytes())


def _write_lines(prefix: str) -> Callable[[np.ndarray, Path], None]:
    return lambda points, path: np.savetxt(path, points, fmt=f"{prefix}%.7g %.7g %.7g")


def _write_glb(points: np.ndarray, path: Path) -> None:
    path.write_bytes(_trimesh().Scene(_trimesh().PointCloud(points)).export(file_type="glb"))


WRITABLE: dict[str, Callable[[np.ndarray, Path], None]] = {
    ".ply": _write_ply,
    ".obj": _write_lines("v "),
    ".xyz": _write_lines(""),
    ".npz": lambda points, path: np.savez_compressed(path, points=points),
    ".npy": lambda points, path: np.save(path, points),
    ".glb": _write_glb,
}
"""How :func:`save_point_cloud` writes each ending."""


def normalize_cloud(cloud: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves a cloud's mean to the origin and divides it by its largest radius.

    Args:
        cloud: (..., N, d) floating point.

    Returns:
        the cloud, its centre (..., 1, d) and its radius (..., 1, 1), 1 where all points are one;
        ``normalized * radius + centre`` is the cloud.

    Example:
        >>> normalize_cloud(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
        (tensor([[-1.,  0.],
                [ 1.,  0.]]), tensor([[2., 1.]]), tensor([[1.]]))
    """
    check_cloud(cloud, "cloud")
    centre = cloud.mean(-2, keepdim=True)
    centred = cloud - centre
    radius = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).amax(-2, keepdim=True)
    radius = torch.where(radius > 0, radius, 1.0)
    return centred / radius, centre, radius


def _trimesh() -> ModuleType:
    try:
        import trimesh
    except ImportError:
        raise ImportError("mesh files need trimesh: pip install 'trimtab[geometry]'") from None
    return trimesh
