"""The methods of ``editing`` at each place of their knobs, with steps that cost about the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ITERATIONS", "METHODS", "STEP_SIZES", "Cell", "cells_of"]

ITERATIONS = {"local": 1, "none": 2, "inverse": 1}
STEP_SIZES = {"local": 0.02, "none": 0.02, "inverse": None}  # of a guided flow, ten times less than of an unguided one
LOCALITY = 0.3
# Evaluations of a step, source and target, where the target is guided.
_COSTS = {
    "sdedit": 2,
    "ode-inversion": 3,
    "uni-inv": 3,
    "rf-inversion": 3,
    "rf-solver": 6,
    "fireflow": 3,
    "flowedit": 4,
}
_STRENGTHS = {
    "sdedit": (0.5, 0.7, 0.85),
    "flowedit": (0.5, 0.65, 0.8, 1.0),
    "flowopt": (0.6, 0.8, 1.0),
}
METHODS = (*_COSTS, "flowopt")


@dataclass(frozen=True)
class Cell:
    """A method at one place of its knob.

    Attributes:
        method: its name.
        knob: what is varied, in words.
        options: arguments of the pipeline's call.
    """

    method: str
    knob: str
    options: dict[str, Any] = field(default_factory=dict)


def cells_of(method: str, budget: int, guidance_scale: float) -> list[Cell]:
    """The cells of a method: its steps cost about the budget.

    Args:
        method: one of `METHODS`.
        budget: evaluations a picture.
        guidance_scale: of the target prompt.
    """
    shared = {"guidance_scale": guidance_scale}
    if method == "flowopt":  # its cells are runs; each gives a point an iterate
        return [
            Cell(method, f"{form}, strength {strength:g}", shared | _flowopt(form, strength, budget))
            for form in ITERATIONS
            for strength in _STRENGTHS[method]
        ]
    steps = round(budget / _COSTS[method])
    if method == "rf-inversion":
        return [
            Cell(method, f"stop {stop:g}", shared | _at(1.0, steps) | {"method_kwargs": {"eta": 0.9, "stop": stop}})
            for stop in (0.15, 0.3, 0.5)
        ]
    if method == "flowedit":
        shared["source_guidance_scale"] = 1.5
    strengths = _STRENGTHS.get(method, (0.6, 0.8, 1.0))
    return [Cell(method, f"strength {strength:g}", shared | _at(strength, steps)) for strength in strengths]


def _flowopt(form: str, strength: float, budget: int) -> dict[str, Any]:
    """Of the paper's update, "none", of "inverse", or of the update under a locality, "local"."""
    iterations = ITERATIONS[form]
    options: dict[str, Any] = {"step_size": STEP_SIZES[form], "num_optimization_steps": iterations}
    if form == "local":
        return options | {"locality": LOCALITY} | _at(strength, round((budget - 1) / (2 * iterations + 3)))
    options["acceleration"] = form
    inverse = form == "inverse"
    steps = (budget / (iterations + 1) - 1) / 3 if inverse else (budget - 1) / (2 * iterations + 3)
    return options | _at(strength, round(steps))


def _at(strength: float, steps: int) -> dict[str, Any]:
    """The schedule of which a strength leaves so many steps."""
    total = round(steps / strength)
    return {"num_inference_steps": total, "strength": steps / total}
