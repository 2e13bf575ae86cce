"""``trimtab reconstruct``: point clouds and meshes in, their reconstructions out."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.job_runner import Outcome, run_jobs
from trimtab.commands.jobs import Job, Key, add_input_argument, check_entry, read_jobs
from trimtab.commands.json_lines import given_path
from trimtab.commands.manifest import read_manifest
from trimtab.commands.pictures import check_folder, save_png, slug

__all__ = ["BUNDLED", "JOB_KEYS", "add_parser", "run", "write_reconstruction"]

BUNDLED = "point-clouds"
FORMATS = ("ply", "glb", "obj", "xyz", "npz")
JOB_KEYS = {
    "file": Key(str),
    "format": Key(str),
    "seed": Key(int, high=2**63 - 1),
    "frames": Key(int, high=1000),
    "size": Key(int, 16, 8192),
}


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="point clouds and meshes through the autoencoder",
        description="For each cloud or mesh writes its reconstruction as a cloud, a turntable of both that moves "
        "(GIF), and a picture of both (PNG), under the file's name and -reconstruction; a line a file into "
        "manifest.jsonl, with their distances at unit radius. A file that is already in the manifest with its outputs "
        "is left alone; `accelerate launch -m trimtab reconstruct ...` shares the files among processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="PLY, OBJ, STL, GLB, OFF, NPZ, NPY or XYZ")
    add_input_argument(parser, JOB_KEYS)
    add("--model", metavar="FOLDER", help="a Diffusers folder of a point-cloud model (default: the bundled one)")
    add("--format", choices=FORMATS, default="ply", help="of the clouds (default: ply)")
    add("--frames", type=int, default=24, metavar="N", help="of the turntable; 0 for none (default: 24)")
    add("--size", type=int, default=320, metavar="PIXELS", help="of the pictures (default: 320)")
    add("--seed", type=int, default=0, metavar="SEED", help="of the points drawn from meshes (default: 0)")
    add("--batch-size", type=int, default=4, metavar="N", help="clouds at once (default: 4)")
    add("--device", default="cpu", metavar="DEVICE", help="such as cpu or cuda:1 (default: cpu)")
    add("--output", default="out", metavar="FOLDER", help="made if missing (default: out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Reconstructs the files.

    Raises:
        UsageError: if an argument cannot be used, or a file; those before it are written then.
        FailedJobs: if some of the lines of ``--input`` failed.
    """
    folder = check_folder(args.output)
    for name, low in (("frames", 0), ("size", 16), ("seed", 0), ("batch_size", 1)):
        if getattr(args, name) < low:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} takes a whole number, {low} or more; got {getattr(args, name)}")
    if bool(args.files) == (args.input is not None):
        raise UsageError("give at least one FILE, or a file of them with --input, but not both")
    options = {"batch_size": args.batch_size, "device": args.device, "keep_going": args.input is not None}
    run_jobs(_Reconstruct(args), folder, **options)


class _Reconstruct:
    noun, endings = "clouds", (*(f".{ending}" for ending in FORMATS), ".png", ".gif")

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._pipe: Any = None

    def jobs(self, folder: Path) -> list[Job]:
        if self._args.input is not None:
            return read_jobs(self._args.input, self._settings, _numbered, self.endings)
        settings = [one for file in self._args.files for one in self._settings({"file": file}, "", Path())]
        known = {name: record["settings"].get("file") for name, record in read_manifest(folder).items()}
        names = {file: name for name, file in known.items() if file and name == slug(name, 200)}
        jobs = {}
        for one in settings:
            name = names.setdefault(one["file"], _free_name(Path(one["file"]), set(names.values())))
            jobs[name] = Job(name, one)
        return list(jobs.values())

    def _settings(self, line: Any, where: str, beside: Path) -> list[dict[str, Any]]:
        check_entry(line, JOB_KEYS, where, required=["file"])
        given = {"model": self._args.model or "bundled"}
        given |= {key: line.get(key, getattr(self._args, key, None)) for key in JOB_KEYS}
        if given["format"] not in FORMATS:
            raise UsageError(f'{where}"format" takes {", ".join(FORMATS)}; got {given["format"][:40]!r}')
        path = beside / given_path(given["file"], f'{where}"file"' if where else "FILE")
        if not path.is_file():
            raise UsageError(f"{where or 'FILE '}takes a file of points or a mesh; there is no {path}")
        return [{**given, "file": str(path.resolve())}]

    def load(self, jobs: Sequence[Job], device: str, *, first: bool) -> None:
        self._pipe = _load(self._args.model, device)

    def group(self, job: Job) -> str:
        return str(job.settings["model"])

    def make(self, batch: Sequence[Job]) -> list[Callable[[Path], Outcome]]:
        import torch

        from trimtab.geometry import load_point_cloud

        count = self._pipe.autoencoder.config.num_points
        try:
            clouds = [
                load_point_cloud(
                    job.settings["file"],
                    num_points=count,
                    generator=torch.Generator().manual_seed(job.settings["seed"]),
                )
                for job in batch
            ]
            output = self._pipe(clouds)
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(first_line(error)) from None
        return [
            partial(_write, job, clouds[i], output.clouds[i], {n: v[i].item() for n, v in output.distances.items()})
            for i, job in enumerate(batch)
        ]


def _write(job: Job, original: Any, cloud: Any, distances: dict[str, float], folder: Path) -> Outcome:
    settings = dict(job.settings)
    path = folder / f"{job.name}.{settings['format']}"
    made_by = {"settings": settings, "distances": distances}
    files = write_reconstruction(original, cloud, path, made_by, frames=settings["frames"], size=settings["size"])
    figures = ", ".join(f"{name} {value:.5f}" for name, value in distances.items())
    return Outcome(files, distances, [f"{path}  {figures}"])


def _numbered(index: int, settings: Mapping[str, Any]) -> str:
    return f"{index:04d}-{slug(Path(settings['file']).stem)}-reconstruction"


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
