"""The site's hook: one reference page a public package, of what the package exports, in its order."""

import importlib
import inspect
import shutil
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PLAIN_COPY = ROOT / "build" / "docs"
PAGES = {
    "trimtab.guidance": "Guidance",
    "trimtab.pipelines": "Pipelines",
    "trimtab.schedulers": "Schedulers",
    "trimtab.rewards": "Rewards",
    "trimtab.geometry": "Geometry",
    "trimtab.optim.search": "Search",
    "trimtab.optim.constrained": "Constrained optimization",
    "trimtab.optim.solvers": "Solvers",
    "trimtab.optim.training": "Training optimizers",
    "trimtab.optim.policy": "Policy gradients",
    "trimtab.optim.inference": "Variational inference",
    "trimtab.optim.analysis": "Analysis",
    "trimtab.optim.protect": "Protection",
    "trimtab.assets": "Assets",
}


def page(package: str) -> str:
    """The page's Markdown: the package's docstring and an entry for each name in its ``__all__``."""
    module = importlib.import_module(package)
    lines = [f"# {PAGES[package]}", f"`{package}`: {inspect.cleandoc(module.__doc__)}"]
    for name in module.__all__:
        thing = getattr(module, name)
        # Names that are loaded when first used are nowhere in the package's text: look where they are defined.
        home = thing.__module__ if inspect.isroutine(thing) or inspect.isclass(thing) else package
        lines.append(f"::: {home}.{name}\n    options:\n      heading: {name}\n      toc_label: {name}")
    return "\n\n".join(lines) + "\n"


def on_startup(**_: Any) -> None:
    """Lays the sources as they are installed: what reads docstrings without imports sees no mapped folders."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shutil.rmtree(PLAIN_COPY, ignore_errors=True)
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for source in (ROOT / folder).rglob("*.py"):
            target = PLAIN_COPY / package.replace(".", "/") / source.relative_to(ROOT / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def on_config(config: Any) -> Any:
    """Adds the guides that the navigation does not name, and the reference."""
    guides = sorted(path.name for path in Path(config.docs_dir).glob("*.md"))
    config.nav += [name for name in guides if name not in config.nav]
    config.nav.append({"Reference": [f"reference/{package}.md" for package in PAGES]})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The README's pictures lie outside of the folder; a page names them as a reader of the repository finds them."""
    return markdown.replace("../assets/readme/", "readme/")


def on_files(files: Any, config: Any) -> Any:
    """Adds the reference's pages, which are never written into the sources, and the README's pictures."""
    for picture in sorted((ROOT / "assets" / "readme").glob("*.png")):
        files.append(File.generated(config, f"readme/{picture.name}", abs_src_path=str(picture)))
    for package in PAGES:
        files.append(File.generated(config, f"reference/{package}.md", content=page(package)))
    return files
