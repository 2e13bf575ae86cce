"""``trimtab reconstruct``: point clouds and meshes in, their reconstructions out."""

import argparse
import sys
from itertools import count
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.pictures import append_manifest, check_folder, save_png, slug

__all__ = ["BUNDLED", "add_parser", "run", "write_reconstruction"]

BUNDLED = "point-clouds"


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="point clouds and meshes through the autoencoder",
        description="For each cloud or mesh writes its reconstruction as a cloud, a turntable of both that moves "
        "(GIF), and a picture of both (PNG), under the file's name and -reconstruction; a line a file into "
        "manifest.jsonl, with their distances at unit radius. A file that is already in the manifest with its outputs "
        "is left alone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="PLY, OBJ, STL, GLB, OFF, NPZ, NPY or XYZ")
    add("--model", metavar="FOLDER", help="a Diffusers folder of a point-cloud model (default: the bundled one)")
    add("--format", choices=("ply", "glb", "obj", "xyz", "npz"), default="ply", help="of the clouds (default: ply)")
    add("--frames", type=int, default=24, metavar="N", help="of the turntable; 0 for none (default: 24)")
    add("--size", type=int, default=320, metavar="PIXELS", help="of the pictures (default: 320)")
    add("--seed", type=int, default=0, metavar="SEED", help="of the points drawn from meshes (default: 0)")
    add("--device", default="cpu", metavar="DEVICE", help="such as cpu or cuda:1 (default: cpu)")
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Reconstructs the files.

    Raises:
        UsageError: if an argument cannot be used, or a file; those before it are written then.
    """
    folder = check_folder(args.output)
    for name, low in (("frames", 0), ("size", 16), ("seed", 0)):
        if getattr(args, name) < low:
            raise UsageError(f"--{name} takes a whole number, {low} or more; got {getattr(args, name)}")
    for file in args.files:
        if not Path(file).expanduser().is_file():
            raise UsageError(f"FILE takes a file of points or a mesh; there is no {file}")
    pipe = _load(args.model, args.device)

    import torch
    from tqdm import tqdm

    from trimtab.geometry import load_point_cloud

    done, names = _read_manifest(folder)
    for file in tqdm(args.files, desc="clouds", unit="cloud", disable=None):
        path = Path(file).expanduser()
        settings = {"model": args.model or "bundled", "seed": args.seed, "size": args.size, "frames": args.frames}
        line = {"source": str(path.resolve()), "format": args.format, **settings}
        if all((folder / name).is_file() for name in done.get(_key(line), ("",))):
            tqdm.write(f"{file}: done before", file=sys.stdout)
            continue
        generator = torch.Generator().manual_seed(args.seed)
        try:
            original = load_point_cloud(path, num_points=pipe.autoencoder.config.num_points, generator=generator)
            output = pipe([original])
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(first_line(error)) from None
        folder.mkdir(parents=True, exist_ok=True)
        line["distances"] = {name: value.item() for name, value in output.distances.items()}
        name = names.setdefault(line["source"], _free_name(path, set(names.values())))
        line["files"] = write_reconstruction(
            original, output.clouds[0], folder / f"{name}.{args.format}", line, frames=args.frames, size=args.size
        )
        append_manifest(folder, line)
        figures = ", ".join(f"{name} {value:.5f}" for name, value in line["distances"].items())
        tqdm.write(f"{folder / line['files'][0]}  {figures}", file=sys.stdout)


def write_reconstruction(
    original: Any, cloud: Any, path: Path, made_by: dict[str, Any], *, frames: int = 24, size: int = 320
) -> list[str]:
    """Writes a reconstruction, and it beside the original as a picture and as a turntable.

    Args:
        original: (N, 3).
        cloud: its reconstruction, (M, 3), in the same frame.
        path: where to write the cloud; its folder exists. The others lie beside it and end in ``.png`` and ``.gif``.
        made_by: what made it, into the PNG.
        frames: of the turntable; 0 for none.
        size: of a picture of one cloud, in pixels.

    Returns:
        The files' names.
    """
    from PIL import Image

    from trimtab.geometry import save_point_cloud, save_turntable, turntable

    save_point_cloud(cloud, path)
    written = [path, path.with_suffix(".png")]
    centre = original.mean(0)
    radius = (original - centre).norm(dim=1).max().clamp_min(1e-12)
    turns = [
        turntable((points.cpu() - centre) / radius, num_frames=max(1, frames), size=size)
        for points in (original, cloud)
    ]
    pairs = []
    for left, right in zip(*turns, strict=True):
        pairs.append(Image.new("RGB", (2 * size, size)))
        pairs[-1].paste(left, (0, 0))
        pairs[-1].paste(right, (size, 0))
    save_png(pairs[0], written[1], made_by)
    if frames:
        written.append(path.with_suffix(".gif"))
        save_turntable(pairs, written[2])
    return [file.name for file in written]


def _free_name(path: Path, taken: set[str]) -> str:
    name = f"{slug(path.stem)}-reconstruction"
    numbered = (f"{name}-{number}" for number in count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _load(model: str | None, device: str) -> Any:
    from trimtab.commands.model import check_model

    if model is None:
        from trimtab.assets import asset_path

        try:
            model = str(asset_path(BUNDLED))
        except FileNotFoundError as error:
            raise UsageError(f"the bundled model is not there: {error}; give one with --model") from None
    model = check_model(model)

    import diffusers
    import torch

    from trimtab.geometry import PointCloudReconstructionPipeline

    diffusers.utils.logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device} cannot be used: {first_line(error)}") from None
    try:
        pipe = PointCloudReconstructionPipeline.from_pretrained(model, use_safetensors=True)
    except Exception as error:  # a broken model raises nearly anything
        raise UsageError(f"--model {model} cannot be loaded: {first_line(error)}") from error
    return pipe.to(device)


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in ("source", "format", "model", "seed", "size", "frames"))


def _read_manifest(folder: Path) -> tuple[dict[tuple[Any, ...], list[str]], dict[str, str]]:
    """What the folder's manifest says was written, by source and settings, and each source's name for its files."""
    import json

    from trimtab.commands.pictures import MANIFEST

    path = folder / MANIFEST
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found, owners, names = {}, {}, {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of a run that was cut
        if isinstance(line, dict) and "source" in line and line.get("files"):
            found[_key(line)] = line["files"]
            owners.update(dict.fromkeys(line["files"], _key(line)))
            names[line["source"]] = Path(line["files"][0]).stem
    # Files that other settings have written since are not there any more.
    return {key: files for key, files in found.items() if all(owners[file] == key for file in files)}, names
