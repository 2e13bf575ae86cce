"""``trimtab info``: versions, devices, guidance rules, the bundled model's figures."""

import argparse
import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trimtab import __version__
from trimtab.commands.model import BUNDLED

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, guidance rules, the bundled model's figures",
        description="Prints versions, devices, guidance rules and the bundled model's measured figures.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a line a fact."""
    for name, value in _facts():
        print(f"{name:<16} {value}")


def _facts() -> Iterator[tuple[str, str]]:
    yield "trimtab", __version__
    yield "python", platform.python_version()
    for package in ("torch", "diffusers", "transformers", "accelerate", "gradio", "peft"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"

    import torch

    yield "cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield "accelerator", "none"
    else:
        for index in range(torch.accelerator.device_count()):
            name = torch.cuda.get_device_name(index) if accelerator.type == "cuda" else accelerator.type
            yield f"{accelerator.type}:{index}", name

    from trimtab.commands.sampling import guidance_names

    yield "guidance", ", ".join(guidance_names())
    yield from _bundled()


def _bundled() -> Iterator[tuple[str, str]]:
    from trimtab.assets import asset_path

    try:
        folder = asset_path(BUNDLED)
    except FileNotFoundError:
        yield "bundled model", "not there"
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield "bundled model", f"{folder} ({size / 1e6:.1f} MB)"
    figures = folder / "figures.json"
    if figures.is_file():
        for name, value in _flat(json.loads(figures.read_text(encoding="utf-8"))):
            yield f"  {name}", value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested figures as lines: the names of the levels joined by spaces."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    else:
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)
