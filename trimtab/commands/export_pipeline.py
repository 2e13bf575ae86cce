"""``trimtab export-pipeline``: a folder with a custom pipeline, ready for the Hub."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trimtab.commands.errors import UsageError
from trimtab.commands.model import BUNDLED, check_model
from trimtab.commands.pictures import check_folder

__all__ = ["add_parser", "custom_pipelines", "export_pipeline", "run"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COPIED = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja", ".png")
"""Endings that are copied of a model: what Diffusers reads, its card and its licence. No pickles, no code."""

_PIPELINE = '''"""{class_name} of trimtab, which must be installed: this file only says where it is."""

from {module} import {class_name}

__all__ = ["{class_name}"]
'''


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "export-pipeline",
        help="a folder with a custom pipeline, ready for the Hub",
        description="Writes a folder that can be pushed to the Hub as it is: pipeline.py, which Diffusers loads with "
        "custom_pipeline=, and a README with its usage. With --model the folder holds a model too, and its "
        "model_index.json names the pipeline, so that it loads without custom_pipeline=. Whoever loads it has to have "
        "trimtab installed. Nothing is uploaded.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="a file of trimtab.pipelines, such as guided_flux; an unknown one lists all")
    add("output", metavar="OUT", help="a folder that is new or empty")
    add("--model", metavar="FOLDER", help=f"a Diffusers folder to go with it; {BUNDLED} is the bundled one")
    add("--repo-id", metavar="OWNER/NAME", help="where it will be on the Hub, for the README")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the folder.

    Raises:
        UsageError: if an argument cannot be used; nothing was written then.
    """
    folder = export_pipeline(args.name, args.output, model=args.model, repo_id=args.repo_id)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(path)
    print(f"to publish: hf upload {args.repo_id or 'OWNER/NAME'} {folder}")


def custom_pipelines() -> dict[str, tuple[str, str]]:
    """The pipelines that can be exported: by file name, the module to import from and the class."""
    import trimtab.pipelines as package

    tables = {**package._GUIDED, **package._FLOWOPT, **package._NOISE_OPTIMIZATION}
    found = {file: ("trimtab.pipelines", class_name) for class_name, file in tables.items()}
    return {**found, "point_cloud": ("trimtab.geometry", "PointCloudReconstructionPipeline")}


def export_pipeline(
    name: str, output: str | os.PathLike[str], *, model: str | None = None, repo_id: str | None = None
) -> Path:
    """Writes a folder with a custom pipeline, under a temporary name first.

    Args:
        name: a file of ``trimtab.pipelines`` that holds a custom pipeline, such as "guided_flux" (or "guided-flux").
        output: the folder, new or empty.
        model: a Diffusers folder whose weights and configs are copied beside it; "emoji-scenes" is the bundled one.
        repo_id: OWNER/NAME on the Hub, for the README.

    Returns:
        The folder.

    Raises:
        UsageError: an unknown name, a folder that holds something, or a model that is none or of another class.
    """
    from trimtab.commands.pipeline_card import pipeline_card

    known = custom_pipelines()
    file = name.replace("-", "_").removesuffix(".py")
    if file not in known:
        raise UsageError(f"NAME takes one of {', '.join(sorted(known))}; got {name!r}")
    if repo_id is not None and not _HUB_ID.fullmatch(repo_id):
        raise UsageError(f"--repo-id takes OWNER/NAME; got {repo_id!r}")
    folder = check_folder(os.fspath(output))
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"OUT takes a folder that is new or empty; {folder} holds something")
    module, class_name = known[file]
    source = None if model is None else _model(model, class_name)
    temporary = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if source is not None:
            _copy_model(source, temporary, class_name)
        (temporary / "pipeline.py").write_text(_PIPELINE.format(class_name=class_name, module=module), encoding="utf-8")
        _write_card(temporary, pipeline_card(file, class_name, repo_id=repo_id, has_model=source is not None))
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _model(model: str, class_name: str) -> Path:
    """The folder of a model that the pipeline can be made of."""
    from trimtab.assets import asset_path

    if model == BUNDLED and not Path(model).exists():
        model = str(asset_path(BUNDLED))
    folder = Path(check_model(model))
    if not folder.is_dir():
        raise UsageError(f"--model takes a folder on this disk; {model} is a Hub id: download it first")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    given = index.get("_class_name")
    given = given[-1] if isinstance(given, list) else given
    stock = _stock_names(class_name)
    if given not in stock:
        raise UsageError(f"--model takes a model of a {' or '.join(sorted(stock))}; {model} is a {given}")
    return folder


def _stock_names(class_name: str) -> set[str]:
    """Names of the classes whose repositories a custom pipeline loads: its stock class's and its own."""
    stock = class_name.removeprefix("Guided").removeprefix("FlowOpt").removeprefix("NoiseOptimization")
    return {stock, class_name}


def _copy_model(source: Path, target: Path, class_name: str) -> None:
    """Copies weights and configs, and has the index name the class in pipeline.py."""
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(source).parts)
        if path.is_file() and not hidden and (path.suffix in _COPIED or path.name.startswith("LICENSE")):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    index = target / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["_class_name"] = ["pipeline", class_name]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, card: tuple[str, str]) -> None:
    """Writes the README, or adds the usage to the model's own, which has the model's licence and figures."""
    front, body = card
    path = folder / "README.md"
    if path.is_file():
        path.write_text(path.read_text(encoding="utf-8").rstrip() + "\n\n" + body, encoding="utf-8")
    else:
        path.write_text(front + body, encoding="utf-8")
