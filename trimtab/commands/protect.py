"""``trimtab protect``: labelled pictures in, changed within a small bound so that a classifier learns less of them."""

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError, first_line
from trimtab.commands.generate import _positive, _seed
from trimtab.commands.pictures import check_folder, save_png, write_json

__all__ = ["add_parser", "labelled_pictures", "run"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REPORT = "protection.json"


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "protect",
        help="labelled pictures that a classifier learns less of",
        description="Changes labelled pictures by at most a few grey levels so that their classes can be told apart "
        "less well (Bayes error optimisation, arXiv 2511.08191). Writes PNGs, exact within the strength, and a report. "
        "It acts against classifiers trained on these pictures; against finetuned image generators it is no "
        "protection that anyone has shown. Saving as JPEG or resizing destroys part of it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of pictures of one size")
    add(
        "--labels",
        default="folders",
        metavar="FILE",
        help="a CSV or JSONL file with file and label of each picture; folders takes each picture's folder "
        "(default: folders)",
    )
    add("--strength", type=_strength, default="8/255", metavar="X", help="largest change of a value (default: 8/255)")
    add(
        "--features",
        choices=("pixels", "bundled"),
        default="pixels",
        help="what tells classes apart: the pixels, or the bundled picture encoder (default: pixels)",
    )
    add("--keep", action="append", default=[], metavar="LABEL", help="a class whose pictures count but don't change")
    add("--resize", type=_positive, metavar="PIXELS", help="crop and resize all pictures to this square first")
    add("--outer-steps", type=_positive, default=10, metavar="N", help="default: 10")
    add("--inner-steps", type=_positive, default=15, metavar="N", help="of the ascent in each (default: 15)")
    add("--seed", type=_seed, default=0, metavar="SEED", help="of the ascent's start (default: 0)")
    add("--output", default="protected", metavar="FOLDER", help="made if missing (default: protected)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes protected pictures and the report, which comes last.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
    """
    given = labelled_pictures(Path(args.folder).expanduser(), args.labels)
    folder = check_folder(args.output)
    source = Path(args.folder).expanduser().resolve()
    if folder.resolve() == source or source in folder.resolve().parents:
        raise UsageError(f"--output takes a folder outside of {args.folder}: old and new pictures would be mixed")
    names = sorted({label for _, label in given})
    if unknown := set(args.keep) - set(names):
        raise UsageError(f"--keep takes labels, {', '.join(names[:8])}; got {', '.join(sorted(unknown))}")
    settings = {
        name: str(value) if isinstance(value, Fraction) else value
        for name, value in vars(args).items()
        if name not in ("run", "output", "labels", "folder")
    }
    pictures = {path.relative_to(_folder(args)).as_posix(): label for path, label in given}
    if len({Path(name).with_suffix("") for name in pictures}) < len(pictures):
        raise UsageError("FOLDER has pictures whose names differ by their ending alone; all become .png: rename them")
    if _is_done(folder / REPORT, settings, pictures):
        print(f"{len(given)} pictures are in {folder} already", file=sys.stderr)
        return

    import torch

    from trimtab.optim import bayes_error_report, cloak

    images = _load([path for path, _ in given], args.resize)
    labels = torch.tensor([names.index(label) for _, label in given])
    fixed = torch.tensor([label in args.keep for _, label in given])

    def tell(state: Any) -> None:
        print(
            f"step {state.outer} of {args.outer_steps}: estimate {state.bayes_error:.4f}", file=sys.stderr, flush=True
        )

    try:
        features = _features(args.features)
        result = cloak(
            images,
            labels,
            eps=float(args.strength),
            feature_fn=features,
            outer_steps=args.outer_steps,
            inner_steps=args.inner_steps,
            fixed=fixed if bool(fixed.any()) else None,
            generator=torch.Generator().manual_seed(args.seed),
            callback=tell,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(first_line(error)) from error
    reports = {}
    for name, stage in (("before", images), ("after", result.images), ("after_jpeg_85", result.after_jpeg(85))):
        with torch.no_grad():
            seen = stage if features is None else torch.cat([features(part) for part in stage.split(64)])
        found = bayes_error_report(seen.flatten(1), labels, bandwidth=_width(reports))
        reports[name] = {**vars(found), "per_class": {names[k]: v for k, v in found.per_class.items()}}
    _write(folder, given, args, result, settings)
    content = {
        "settings": settings,
        "pictures": pictures,
        "max_change": f"{round(result.max_change * 255)}/255",
        "psnr": {"mean": _finite_mean(result.psnr), "least": float(result.psnr.min())},
        "bayes_error": result.bayes_error,
        "told_apart": reports,
        "says_nothing_about": "finetuned image generators, clean pictures of the same classes from elsewhere",
    }
    write_json(folder / REPORT, content)
    before, after = reports["before"], reports["after"]
    print(
        f"{folder}  {len(given)} pictures changed by at most {content['max_change']}; nearest neighbours err "
        f"{100 * before['knn_upper']:.0f} % before, {100 * after['knn_upper']:.0f} % after; kernel's estimate "
        f"{before['estimate']:.3f} -> {after['estimate']:.3f}",
        flush=True,
    )


def labelled_pictures(folder: Path, labels: str) -> list[tuple[Path, str]]:
    """Pictures and their labels, sorted by path.

    Args:
        folder: with the pictures.
        labels: "folders", or a CSV or JSONL file whose rows have file (relative to the folder) and label.

    Raises:
        UsageError: no folder, no pictures, a picture that isn't there, or rows of another form.
    """
    if not folder.is_dir():
        raise UsageError(f"FOLDER takes a folder of pictures; {folder} is none")
    if labels == "folders":
        found = [(p, p.parent.name) for p in sorted(folder.rglob("*")) if p.suffix.lower() in ENDINGS]
        if not found or any(path.parent == folder for path, _ in found):
            takes = "a folder that has a folder of pictures for each label, or --labels FILE"
            raise UsageError(f"FOLDER takes {takes}; got {folder}")
        return found
    rows = _rows(Path(labels).expanduser())
    found = []
    for line, row in rows:
        if not isinstance(row, Mapping) or not row.get("file") or row.get("label") in (None, ""):
            raise UsageError(f"--labels {labels}, line {line}: takes file and label; got {str(row)[:40]}")
        path = folder / str(row["file"])
        if not path.is_file() or folder.resolve() not in path.resolve().parents:
            raise UsageError(f"--labels {labels}, line {line}: no picture {row['file']} in {folder}")
        found.append((path, str(row["label"])))
    if len({path for path, _ in found}) < len(found) or not found:
        raise UsageError(f"--labels {labels} takes each picture once, and one at least")
    return sorted(found)


def _folder(args: argparse.Namespace) -> Path:
    return Path(args.folder).expanduser()


def _rows(path: Path) -> list[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".csv":
            return [(line, row) for line, row in enumerate(csv.DictReader(text.splitlines()), 2)]
        return [(line, json.loads(row)) for line, row in enumerate(text.splitlines(), 1) if row.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--labels {path}: {first_line(error)}") from error


def _load(paths: list[Path], size: int | None) -> Any:
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    arrays = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except OSError as error:
            raise UsageError(f"{path}: {first_line(error)}") from error
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        arrays.append(np.asarray(picture))
        if arrays[-1].shape != arrays[0].shape:
            raise UsageError(f"{path} is {picture.width}x{picture.height}, others are not; make them alike by --resize")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _features(name: str) -> Any:
    if name == "pixels":
        return None
    from trimtab.rewards import load_reward

    return load_reward("bundled").image_features


def _write(folder: Path, given: list[tuple[Path, str]], args: Any, result: Any, settings: Mapping[str, Any]) -> None:
    from PIL import Image

    for (path, _), image in zip(given, result.images, strict=True):
        target = (folder / path.relative_to(_folder(args))).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        values = (image * 255).round().byte().permute(1, 2, 0).numpy()
        save_png(Image.fromarray(values), target, {"protected": dict(settings)})


def _width(reports: Mapping[str, Any]) -> Any:
    return reports["before"]["bandwidth"] if reports else "auto"


def _finite_mean(values: Any) -> float | None:
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else None


def _strength(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not Fraction(1, 255) <= value <= Fraction(64, 255):
        raise argparse.ArgumentTypeError(f"takes a number from 1/255 to 64/255, such as 8/255; got {text}")
    return value


def _is_done(path: Path, settings: Mapping[str, Any], pictures: Mapping[str, str]) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content.get("settings") == dict(settings) and content.get("pictures") == dict(pictures)
    except (OSError, ValueError, AttributeError):
        return False
