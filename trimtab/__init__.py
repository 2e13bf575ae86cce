"""trimtab: steers frozen diffusion and flow models at inference time.

The parts are sub-packages, imported by their installed names: ``trimtab.guidance``, ``trimtab.pipelines``,
``trimtab.rewards``, ``trimtab.recipes``, ``trimtab.assets`` and others. The names below are shortcuts, loaded when
first used, so that ``import trimtab`` costs nothing.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).parent  # not .resolve(): strict editable installs use links
if __name__ == "trimtab" and not (_here / "pipelines").is_dir():
    __path__.append(str(_here.parent))  # a source checkout: the sub-packages lie beside this folder

_EXPORTS = {
    "AdaptiveProjectedGuidance": "trimtab.guidance",
    "FlowOptPipeline": "trimtab.pipelines",
    "GenerationMap": "trimtab.pipelines",
    "NoiseOptimizationPipeline": "trimtab.pipelines",
    "asset_path": "trimtab.assets",
    "attach": "trimtab.guidance",
    "load_reward": "trimtab.rewards",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    """Imports a shortcut's sub-package on first use (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
