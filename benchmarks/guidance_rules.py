"""All guidance rules on the bundled model: which keeps captions, colours and the look of the scenes, at which scale.

The claim: at w = 15 the saturation under adaptive projected guidance (APG) is within 5 % of the training scenes', where
plain guidance's (CFG) is not, and captions match as often as under CFG at its best scale.

    trimtab bench guidance                 # the same from the installed package
    python benchmarks/guidance_rules.py    # into benchmarks/results

Each cell, a rule at a scale, draws one picture for each of the same held-out captions from the same noise, as
``trimtab generate`` does. Measured are: how often ``check_scene`` finds all that the caption states and nothing else;
saturation and contrast, beside those of scenes rendered for the same captions; the Fréchet distance in emoji-clip's
image features to scenes of the same kind (``scene_figures.Scenes``); seconds a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.benchmarks.bundled_model import held_out_captions
from trimtab.benchmarks.figures import proportion_interval, ratio_interval
from trimtab.benchmarks.scene_figures import Scenes
from trimtab.commands.errors import UsageError
from trimtab.commands.sampling import sample
from trimtab.guidance import make_guider

__all__ = ["NONE", "PLAN", "Settings", "claims", "plan", "run", "table"]

NONE = "none"
"""No guidance: w = 1 of the rules that agree there, measured once."""
_WHOLE, _SOME = (2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0), (3.0, 7.0, 15.0)
PLAN: dict[str, tuple[float, ...]] = {
    NONE: (1.0,),
    "cfg": _WHOLE,
    "apg": _WHOLE,
    "rescale": (*_SOME, 20.0),
    "tcfg": (*_SOME, 20.0),
    "cfg-zero": (*_SOME, 20.0),
    "interval": (*_SOME, 20.0),
    "mambo-g": (*_SOME, 20.0),
    "fdg": (*_SOME, 20.0),
    "cfg++": (0.4, 0.6, 0.8, 1.0),
    "pag": _SOME,
    "seg": _SOME,
    "slg": _SOME,
    "autoguidance": (1.5, 2.0, 3.0),
}
"""Scales of each rule: lambda for CFG++, w for the others."""
OWN_SCALE = ("cfg++", "autoguidance")
"""Rules whose scale means something else than plain guidance's w."""


@dataclass(frozen=True)
class Settings:
    """What results depend on besides the rule and its scale; results of other settings are not reused.

    Attributes:
        model: digest of the model's weights, or its Hub id.
        num_captions: held-out captions, an equal number of each category in turn.
        steps: of the scheduler.
        seed: of the first picture; picture i has seed + i.
        dtype: what the model computes in.
        device: the kind of device.
        num_scenes: scenes that the Fréchet distance is to.
    """

    model: str
    num_captions: int
    steps: int
    seed: int
    dtype: str
    device: str
    num_scenes: int


def digest(model: str) -> str:
    """Sixteen hexadecimal digits that tell a folder's weights from others; a Hub id stays as it is."""
    found = hashlib.sha256()
    files = sorted(Path(model).rglob("*.safetensors"))
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16] if files else model


def plan(rules: Sequence[str] | None = None, scales: Sequence[float] | None = None) -> list[tuple[str, float]]:
    """The cells to measure.

    Args:
        rules: which of ``PLAN``; None for all.
        scales: w in place of the plan's, for all rules but those of ``OWN_SCALE``; 1 is measured once, as no guidance.

    Raises:
        UsageError: for a rule that isn't in the plan.
    """
    rules = list(PLAN) if rules is None else [NONE, *(rule for rule in rules if rule != NONE)]
    if unknown := [rule for rule in rules if rule not in PLAN]:
        raise UsageError(f"--rules takes some of {', '.join(PLAN)}; got {', '.join(unknown)}")
    cells = []
    for rule in rules:
        own = scales is None or rule in OWN_SCALE or rule == NONE
        cells += [(rule, scale) for scale in (PLAN[rule] if own else scales) if own or scale != 1]
    return cells


def run(
    pipe: Any,
    settings: Settings,
    cells: Sequence[tuple[str, float]],
    path: Path,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
    on_pictures: Callable[[str, float, int], None] = lambda rule, scale, count: None,
    on_cell: Callable[[dict[str, Any]], None] = lambda cell: None,
) -> dict[str, Any]:
    """Measures the cells that ``path`` doesn't hold yet; after each of them the file is whole.

    Args:
        pipe: the pipeline.
        settings: of all cells.
        cells: rules and scales.
        path: the JSON file, made with its folder if missing.
        batch_size: pictures at once; the results don't depend on it.
        overwrite: whether results of other settings in the file are replaced.
        on_pictures: called with rule, scale and how many pictures are done now; for a progress bar.
        on_cell: called with each finished cell.

    Returns:
        The report as the file has it: ``settings``, ``scenes``, ``claims`` and ``cells``, those found there too.

    Raises:
        UsageError: if the file is no report, or one of other settings, and isn't to be overwritten.
    """
    known = {} if overwrite else _known(path, settings)
    captions = held_out_captions(settings.num_captions)
    scenes: Scenes | None = None
    report: dict[str, Any] = known or {"settings": asdict(settings), "scenes": {}, "claims": {}, "cells": []}
    for rule, scale in cells:
        config = _config(rule, scale, pipe)
        kept = [cell for cell in report["cells"] if (cell["rule"], cell["scale"]) == (rule, scale)]
        if any(cell["guider"] == config for cell in kept):
            on_pictures(rule, scale, len(captions))
            continue
        if scenes is None:
            scenes = Scenes(captions, pipe.device)
            own = {"saturation": scenes.saturation, "contrast": scenes.contrast}
            per_caption = {name: [round(v, 4) for v in values] for name, values in own.items()}
            means = {f"mean_{name}": sum(values) / len(values) for name, values in own.items()}
            report["scenes"] = {**means, **scenes.cell, "per_caption": per_caption}
        images, seconds = _draw(pipe, rule, scale, captions, settings, batch_size, on_pictures)
        cell = {"rule": rule, "scale": scale, "guider": config, "seconds_per_picture": round(seconds, 4)}
        cell |= scenes.measure(images)
        report["cells"] = [other for other in report["cells"] if other not in kept] + [cell]
        report["claims"] = claims(report)
        _write(path, report)
        on_cell(cell)
    return report


def _draw(
    pipe: Any,
    rule: str,
    scale: float,
    captions: Sequence[str],
    settings: Settings,
    batch_size: int,
    on_pictures: Callable[[str, float, int], None],
) -> tuple[torch.Tensor, float]:
    """Pictures of the captions, (N, 3, H, W) in [0, 1], and seconds for each."""
    parts, seconds = [], 0.0
    for start in range(0, len(captions), batch_size):
        part = captions[start : start + batch_size]
        seeds = range(settings.seed + start, settings.seed + start + len(part))
        name = "cfg" if rule == NONE else rule
        began = time.perf_counter()
        parts += sample(pipe, part, seeds, guidance=name, guidance_scale=scale, steps=settings.steps)
        seconds += time.perf_counter() - began
        on_pictures(rule, scale, len(part))
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in parts])
    return torch.from_numpy(pixels).movedim(-1, 1) / 255, seconds / len(captions)


def _config(rule: str, scale: float, pipe: Any) -> dict[str, Any]:
    """The rule's settings, as far as they are numbers: a cell of others is measured anew."""
    if rule in (NONE, "cfg"):
        return {}
    config = json.loads(make_guider(rule, scale, pipe).to_json_string())
    return {key: value for key, value in config.items() if key != "_diffusers_version"}


def _known(path: Path, settings: Settings) -> dict[str, Any]:
    """The report in a file, if there is one."""
    if not path.exists():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report["settings"]
        if not {"scenes", "cells"} <= set(report):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} holds no results of this benchmark; --overwrite replaces it") from None
    wanted = asdict(settings)
    if other := [
        f"{name} {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value
    ]:
        raise UsageError(f"{path} holds results of other settings ({'; '.join(other)}); --overwrite replaces them")
    return report


def _write(path: Path, report: dict[str, Any]) -> None:
    """A line for each cell; under a temporary name first, so that the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in report.items() if name != "cells"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    cells = ",\n  ".join(json.dumps(cell) for cell in report["cells"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text("{\n" + "\n".join(lines) + f'\n "cells": [\n  {cells}\n ]\n}}\n', encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def saturation_ratio(report: dict[str, Any], cell: dict[str, Any]) -> tuple[float, float, float]:
    """A cell's saturation over the scenes', with its interval over captions."""
    scenes = report["scenes"]["per_caption"]["saturation"]
    low, high = ratio_interval(cell["pictures"]["saturation"], scenes)
    return cell["saturation"] / report["scenes"]["mean_saturation"], low, high


def saturation_deviation(report: dict[str, Any], cell: dict[str, Any]) -> float:
    """Mean over the pictures of |saturation / its scenes' - 1|, which changes both ways don't cancel in."""
    scenes = report["scenes"]["per_caption"]["saturation"]
    return float(np.abs(np.divide(cell["pictures"]["saturation"], scenes) - 1).mean())


def claims(report: dict[str, Any]) -> dict[str, Any]:
    """The issue's bar, as far as its cells are there: saturation at w = 15, and matches beside CFG's best scale."""
    cells = {(cell["rule"], cell["scale"]): cell for cell in report["cells"]}
    found: dict[str, Any] = {}
    for rule in ("cfg", "apg"):
        if (rule, 15.0) in cells:
            cell = cells[rule, 15.0]
            found[f"{rule}_saturation_over_scenes_at_15"] = saturation_ratio(report, cell)
            found[f"{rule}_saturation_deviation_at_15"] = saturation_deviation(report, cell)
            found[f"{rule}_match_at_15"] = cell["match"]
    plain = [cell for (rule, _), cell in cells.items() if rule in (NONE, "cfg")]
    if plain:
        best = max(plain, key=lambda cell: cell["match"])
        found["cfg_best_match"], found["cfg_best_scale"] = best["match"], best["scale"]
    return found


def table(report: dict[str, Any]) -> str:
    """The results in Markdown, a row for each cell in the plan's order."""
    settings, scenes = report["settings"], report["scenes"]
    order = list(PLAN)
    cells = sorted(report["cells"], key=lambda cell: (order.index(cell["rule"]), cell["scale"]))
    lines = [
        f"{settings['num_captions']} held-out captions, {settings['steps']} steps, {settings['dtype']} on "
        f"{settings['device']}, model {settings['model']}. Match: all that the caption states and nothing else, with "
        "Wilson's 95 % interval. Saturation over that of scenes rendered for the same captions, with a bootstrap's "
        "95 % interval; off by: the mean over the pictures of its distance from 1. Fréchet distance x 1000 in "
        f"emoji-clip's features to {settings['num_scenes']} scenes: its floor at this number of pictures is that of "
        "the first row.",
        "",
        "| rule | scale | match | saturation / scenes | off by | contrast | Fréchet | s a picture |",
        "|---|---|---|---|---|---|---|---|",
        f"| rendered scenes | | {scenes['match']:.0%} | {scenes['saturation'] / scenes['mean_saturation']:.3f} | "
        f"{saturation_deviation(report, scenes):.1%} | "
        f"{scenes['contrast']:.3f} | {1000 * scenes['frechet']:.0f} | |",
    ]
    for cell in cells:
        low, high = proportion_interval(cell["pictures"]["right"].count("1"), len(cell["pictures"]["right"]))
        ratio = saturation_ratio(report, cell)
        lines.append(
            f"| {cell['rule']} | {cell['scale']:g} | {cell['match']:.0%} ({low:.0%} to {high:.0%}) | "
            f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}) | "
            f"{saturation_deviation(report, cell):.1%} | {cell['contrast']:.3f} | "
            f"{1000 * cell['frechet']:.0f} | {cell['seconds_per_picture']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """``trimtab bench guidance`` into the results' folder."""
    from trimtab.commands import bench_guidance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench_guidance.add_arguments(parser, output=str(Path(__file__).parent / "results"), name="guidance_rules")
    bench_guidance.run(parser.parse_args())


if __name__ == "__main__":
    main()
