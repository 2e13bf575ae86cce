"""What is installed is what pyproject.toml says, and works as a wheel and in a checkout."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trimtab
from trimtab.assets import asset_path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
TOP_FOLDERS = sorted(set(FOLDERS.values()) - {"trimtab"})
DATA = (".safetensors", ".json", ".png", ".txt", ".md")


def python(*arguments: str, folder: Path, **environment: str) -> str:
    """What a fresh interpreter prints; an error there is an error here."""
    environment = {**os.environ, "PYTHONNOUSERSITE": "1", **environment}
    run = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build reads: setuptools leaves its build folder beside the sources."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "app.py").write_text("import trimtab.assets\n")  # stands at the root, must not ship
    (copy / "conftest.py").touch()
    (copy / "tests").mkdir()
    (copy / "tests" / "test_nothing.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder))
    python("-m", "pip", "wheel", *options, str(checkout), folder=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_every_folder_with_an_init_is_listed():
    found = {
        name if folder == root else f"{name}.{folder.relative_to(root).as_posix().replace('/', '.')}"
        for name, root in ((name, ROOT / folder) for name, folder in FOLDERS.items())
        for folder in (init.parent for init in root.rglob("__init__.py"))
    }
    assert found == set(PACKAGES)


def test_no_module_is_left_out_for_want_of_an_init():
    bare = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in FOLDERS.values()
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    }
    assert bare == set()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    info = f"trimtab-{trimtab.__version__}.dist-info/"
    assert {name for name in sizes if not name.startswith(("trimtab/", info))} == set()
    assert {name for name in sizes if "tests" in name or name.endswith("/conftest.py")} == set()
    assert "app.py" not in sizes  # the Space's, at the root
    assert f"{info}licenses/LICENSE" in sizes and "trimtab/py.typed" in sizes
    shipped = {name.removeprefix("trimtab/assets/"): size for name, size in sizes.items() if "/assets/" in name}
    wanted = {
        path.relative_to(ROOT / "assets").as_posix(): path.stat().st_size
        for path in (ROOT / "assets").rglob("*")
        if path.is_file() and (path.suffix in DATA or "LICENSE" in path.name or path.name == "__init__.py")
    }
    assert shipped == wanted


def test_every_asset_has_an_ending_that_ships():
    left_out = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "assets").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if path.suffix not in (*DATA, ".py") and "LICENSE" not in path.name
    ]
    assert left_out == []


def test_the_installed_wheel_works_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ("--quiet", "--no-deps", "--no-index", "--target", str(site))
    python("-m", "pip", "install", *options, str(wheel), folder=elsewhere)
    code = (
        "import json, trimtab, trimtab.assets as assets, trimtab.recipes as recipes;"
        "print(json.dumps([list(trimtab.__path__), assets.__file__, recipes.__file__]))"
    )
    paths, assets, recipes = json.loads(python("-c", code, folder=elsewhere, PYTHONPATH=str(site)))
    assert paths == [str(site / "trimtab")]  # site-packages itself is never searched for sub-packages
    assert Path(assets) == site / "trimtab" / "assets" / "__init__.py"
    assert Path(recipes) == site / "trimtab" / "recipes" / "__init__.py"
    printed = python("-m", "trimtab", "--version", folder=elsewhere, PYTHONPATH=str(site))
    assert printed == f"trimtab {trimtab.__version__}\n"
    (record,) = site.glob("*.dist-info/RECORD")
    assert "bin/trimtab" in record.read_text(encoding="utf-8")


def test_a_checkout_runs_with_nothing_of_trimtab_installed(checkout, tmp_path):
    code = "import app, trimtab; print(trimtab.assets.__file__)"
    printed = python("-c", code, folder=checkout)
    assert Path(printed.strip()) == checkout / "assets" / "__init__.py"
    python(str(checkout / "app.py"), folder=tmp_path)


def test_walking_the_package_ends(checkout):
    code = "import pkgutil, trimtab; print(len(list(pkgutil.iter_modules(trimtab.__path__))))"
    assert int(python("-c", code, folder=checkout)) < 50


def test_importing_all_makes_no_second_copies():
    code = f"""
import importlib, pkgutil, sys
import trimtab
for name in {PACKAGES!r}:
    package = importlib.import_module(name)
    paths = list(package.__path__)[:1]
    for module in pkgutil.iter_modules(paths, name + "."):
        if not module.ispkg and not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
print([name for name in {TOP_FOLDERS!r} if name in sys.modules])
"""
    assert python("-W", "ignore", "-c", code, folder=ROOT) == "[]\n"


def test_imports_take_little_beside_what_they_import():
    """The library's own share of the time, in one process, where other work on the machine meets both alike."""
    code = "import trimtab.guidance, trimtab.pipelines, trimtab.rewards, trimtab.schedulers, trimtab.geometry"
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.removeprefix("import time:").split("|") for line in run.stderr.splitlines() if line.count("|") == 2]
    own = {"trimtab": 0, "others": 0}
    for microseconds, _, name in rows[1:]:
        own["trimtab" if name.strip().split(".")[0] == "trimtab" else "others"] += int(microseconds)
    assert own["trimtab"] > 0
    assert own["trimtab"] + own["others"] <= 1.05 * own["others"], own


def test_importing_trimtab_waits_for_nothing():
    code = "import sys, trimtab; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    assert python("-c", code, folder=ROOT) == "[]\n"


def test_shortcuts_are_the_sub_packages_own():
    for name, module in trimtab._EXPORTS.items():
        assert getattr(trimtab, name) is getattr(importlib.import_module(module), name)
        assert name in dir(trimtab)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trimtab.nonsense  # noqa: B018


def test_requirements_are_the_dependencies_and_the_app():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["app"]
    assert [line for line in lines if line and not line.startswith("#")] == wanted


def test_constraints_pin_every_direct_dependency_within_its_bounds():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(pin.name)] = specifier.version
    project = PYPROJECT["project"]
    for line in project["dependencies"] + sum(project["optional-dependencies"].values(), []):
        wanted = Requirement(line)
        if wanted.name != "trimtab":
            assert {specifier.operator for specifier in wanted.specifier} == {">="}, line
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line


def test_the_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{trimtab.__version__}]" in text and "## [Unreleased]" in text


def test_asset_path_finds_what_there_is():
    assert asset_path("__init__.py") == ROOT / "assets" / "__init__.py"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../pyproject.toml", "a/../../b", "a//b", "a\\b", "."])
def test_asset_path_stays_in_its_folder(name):
    with pytest.raises(ValueError, match="`name` must be a relative name"):
        asset_path(name)


def test_asset_path_names_what_there_is():
    with pytest.raises(FileNotFoundError, match="no asset 'no/such'; it has .*emoji-sprites"):
        asset_path("no/such")
