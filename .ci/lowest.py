"""Prints the lowest versions that pyproject.toml allows, as constraints for pip; tools of the tests are left out."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + [line for name in ("geometry", "app", "training", "search") for line in extras[name]]
print("\n".join(sorted({line.replace(">=", "==") for line in wanted}, key=str.lower)))
