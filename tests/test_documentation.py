"""Examples in docstrings and in the README are run."""

import doctest
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

from trimtab.pipelines.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A comment before a snippet says why it is not run.
SNIPPET = re.compile(r"(?P<comment><!-- not run: .+? -->\n)?```python\n(?P<code>.+?)```", re.DOTALL)


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings(package):
    module = importlib.import_module(package)
    names = [info.name for info in pkgutil.iter_modules(list(module.__path__)[:1]) if not info.ispkg]
    for name in ("", *(f".{name}" for name in names if name != "__main__")):
        assert doctest.testmod(importlib.import_module(package + name)).failed == 0, package + name


def test_readme_snippets(tmp_path, monkeypatch):
    """In their order and in one namespace, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for match in SNIPPET.finditer(README):
        if not match["comment"]:
            line = README[: match.start("code")].count("\n")
            exec(compile("\n" * line + match["code"], "README.md", "exec"), names)


def test_readme_lists_the_families():
    rows = [
        f"| {family.name} | {', '.join(f'`{name}`' for name in family.pipelines)} | {family.guidance.calls} |"
        for family in FAMILIES
    ]
    table = re.search(r"^\| family .+\n\|[-|]+\n((?:\|.+\n)*)", README, re.MULTILINE)
    assert table[1].splitlines() == rows, "the README's table is to be:\n" + "\n".join(rows)


def test_readme_names_real_paths():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
