"""Examples in docstrings, in the README and in the documentation's pages are run."""

import doctest
import importlib
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from trimtab import cli, optim
from trimtab.pipelines.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment before a snippet says why it is not run.
SNIPPET = re.compile(r"(?P<comment><!-- not run: .+? -->\n)?```(?P<language>\w+)\n(?P<code>.+?)```", re.DOTALL)


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings(package):
    module = importlib.import_module(package)
    names = [info.name for info in pkgutil.iter_modules(list(module.__path__)[:1]) if not info.ispkg]
    for name in ("", *(f".{name}" for name in names if name != "__main__")):
        assert doctest.testmod(importlib.import_module(package + name)).failed == 0, package + name


@pytest.fixture
def families():
    """The table, which the page on families adds to."""
    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


def snippets(page: Path, language: str) -> list[tuple[int, str]]:
    """The line before the code, and the code, of a page's snippets that are to be run."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in SNIPPET.finditer(text) if match["language"] == language and not match["comment"]]
    return [(text[: match.start("code")].count("\n"), match["code"]) for match in found]


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # within diffusers' Chroma
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets(page, families, tmp_path, monkeypatch):
    """In their order and in one namespace, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in snippets(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    """Commands name targets of make, options of the command line and modules that there are."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for _, code in snippets(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert set(words[1:]) <= targets, line
            elif words[:1] == ["trimtab"]:
                cli._parser().parse_args(words[1:])
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), line


def test_the_reference_has_every_public_package():
    hook = (ROOT / "docs" / "reference.py").read_text(encoding="utf-8")
    parts = {f"trimtab.{name}" for name in ("assets", "geometry", "guidance", "pipelines", "rewards", "schedulers")}
    for package in parts | {f"trimtab.optim.{name}" for name in optim._PARTS}:
        assert f'"{package}"' in hook, package


def test_readme_lists_the_families():
    rows = [
        f"| {family.name} | {', '.join(f'`{name}`' for name in family.pipelines)} | {family.guidance.calls} |"
        for family in FAMILIES
    ]
    table = re.search(r"^\| family .+\n\|[-|]+\n((?:\|.+\n)*)", README, re.MULTILINE)
    assert table[1].splitlines() == rows, "the README's table is to be:\n" + "\n".join(rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_real_paths(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
