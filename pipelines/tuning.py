"""Settings tuned for a model on prompts, under any judge: guidance, and the step of noise optimization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.guidance import AdaptiveProjectedGuidance, TunedPreset, attach
from trimtab.guidance.adaptive_projected import RESCALE_RMS
from trimtab.optim.checks import checked_count, checked_number
from trimtab.optim.search import ConsensusHopping
from trimtab.rewards import RewardModel

__all__ = ["GUIDANCE_KNOBS", "NOISE_KNOBS", "Knob", "TuningResult", "guidance_judgement", "noise_judgement", "tune"]


@dataclass(frozen=True)
class Knob:
    """A setting and where to look for it.

    Attributes:
        low: the least value.
        high: the largest one.
        default: where the search starts, between them.
        log: whether steps are relative; `low` is then > 0.
    """

    low: float
    high: float
    default: float
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high", "default"):
            checked_number(name, getattr(self, name))
        if not self.low <= self.default <= self.high or self.low >= self.high or self.log and self.low <= 0:
            takes = "0 < low" if self.log else "low"
            raise ValueError(
                f"a knob from {self.low} to {self.high} at {self.default}; takes {takes} <= default <= high"
            )

    def value(self, code: float) -> float:
        """The value of a code in [0, 1]; codes outside are moved there."""
        code = min(max(code, 0.0), 1.0)
        if self.log:
            return math.exp(math.log(self.low) + code * math.log(self.high / self.low))
        return self.low + code * (self.high - self.low)

    def code(self, value: float) -> float:
        """The code of a value."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


GUIDANCE_KNOBS: dict[str, Knob] = {
    "guidance_scale": Knob(1.5, 20.0, 10.0, log=True),
    "momentum": Knob(-0.9, 0.5, -0.5),
    "rescale_rms": Knob(0.005, 1.0, RESCALE_RMS, log=True),
}
"""Of adaptive projected guidance."""
NOISE_KNOBS: dict[str, Knob] = {"lr": Knob(0.003, 0.3, 0.03, log=True)}
"""Of noise optimization: the relative step of its preset "sphere"."""


@dataclass(frozen=True)
class TuningResult:
    """What was found.

    Attributes:
        settings: the best ones.
        value: what they were judged.
        default_value: what the knobs' defaults were judged.
        history: settings and value of each evaluation, in order; the first has the defaults.
    """

    settings: dict[str, float]
    value: float
    default_value: float
    history: tuple[tuple[dict[str, float], float], ...]


def tune(
    judge: Callable[[dict[str, float]], float],
    knobs: Mapping[str, Knob],
    *,
    evaluations: int = 32,
    num_particles: int = 8,
    width: float = 0.3,
    width_end: float = 0.08,
    seed: int = 0,
    known: Iterable[float] = (),
    on_evaluation: Callable[[dict[str, float], float], None] | None = None,
) -> TuningResult:
    """Consensus hopping over settings, each a number from 0 to 1 between its bounds.

    The defaults are the first that is judged, so the result is never judged worse. A judge with noise of its own, such
    as one of few prompts, flatters the best of many: look at the result on other prompts.

    Args:
        judge: settings by name to a number, higher is better, the same for the same settings. One that is not finite
            counts as worst.
        knobs: by name.
        evaluations: of `judge`, >= 2; the last hop is cut short where they don't divide.
        num_particles: evaluations a hop.
        width: of the first hop, in [0, 1] of a knob's range.
        width_end: of the last one.
        seed: of the samples.
        known: values of the first evaluations, from an earlier run with the same arguments: they are not judged again.
        on_evaluation: called with settings and value after each new one.

    Raises:
        ValueError: for a number out of range, or no knobs.

    Example:
        >>> found = tune(lambda s: -(s["x"] - 3) ** 2, {"x": Knob(0.0, 10.0, 8.0)}, evaluations=48)
        >>> abs(found.settings["x"] - 3) < 0.5, found.default_value
        (True, -25.0)
    """
    if not knobs:
        raise ValueError("`knobs` is empty; takes at least one")
    count = checked_count("evaluations", evaluations, 2)
    checked_count("num_particles", num_particles, 2)
    names, earlier = list(knobs), list(known)
    search = ConsensusHopping(
        torch.tensor([knobs[name].code(knobs[name].default) for name in names], dtype=torch.float64),
        steps=max(count // num_particles, 1),
        num_particles=num_particles,
        width=width,
        width_end=width_end,
        geometry="euclidean",
        generator=torch.Generator().manual_seed(seed),
    )
    history: list[tuple[dict[str, float], float]] = []
    while len(history) < count:
        energies = []
        for code in search.ask().tolist()[: count - len(history)]:
            settings = {name: knobs[name].value(c) for name, c in zip(names, code, strict=True)}
            if len(history) < len(earlier):
                value = float(earlier[len(history)])
            else:
                value = float(judge(settings))
                if on_evaluation is not None:
                    on_evaluation(settings, value)
            history.append((settings, value))
            energies.append(-value if math.isfinite(value) else math.inf)
        if len(energies) == num_particles and any(map(math.isfinite, energies)):
            search.tell(torch.tensor(energies, dtype=torch.float64))
        elif len(energies) == num_particles:
            raise FloatingPointError("no setting of a whole hop was judged with a finite number")
    best = max(history, key=lambda entry: entry[1] if math.isfinite(entry[1]) else -math.inf)
    return TuningResult(best[0], best[1], history[0][1], tuple(history))


def guidance_judgement(
    pipe: Any,
    prompts: Sequence[str],
    judge: RewardModel,
    *,
    seed: int = 0,
    batch_size: int = 8,
    **arguments: Any,
) -> Callable[[dict[str, float]], float]:
    """Settings of adaptive projected guidance to the mean of a judge over prompts, each with noise of its own.

    Args:
        pipe: a stock pipeline with classifier-free guidance.
        prompts: at least one.
        judge: of pictures.
        seed: of the first prompt's noise; the next have the next ones.
        batch_size: pictures at once.
        arguments: of the stock call, such as `num_inference_steps`.
    """
    device = next((tensor.device for tensor in (*judge.parameters(), *judge.buffers())), None)

    @torch.no_grad()
    def judged(settings: dict[str, float]) -> float:
        options = TunedPreset(guidance=settings).guidance_arguments()
        values = []
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
            scale = max(2.0, options.get("guidance_scale", 2.0))  # switches guidance on; the guider's scale holds
            with attach(pipe, AdaptiveProjectedGuidance(**options)):
                images = pipe(
                    prompt=texts, generator=generators, output_type="pt", guidance_scale=scale, **arguments
                ).images.float()
            values.append(judge(images if device is None else images.to(device), texts).cpu())
        return float(torch.cat(values).mean())

    return judged


def noise_judgement(
    pipe: Any, prompts: Sequence[str], judge: RewardModel, *, seed: int = 0, batch_size: int = 8, **arguments: Any
) -> Callable[[dict[str, float]], float]:
    """Settings of noise optimization to the mean of a judge over the best pictures of its reward.

    Args:
        pipe: a `NoiseOptimizationPipeline` with a reward.
        prompts: at least one.
        judge: a reward other than the pipeline's.
        seed: of the first prompt's noise.
        batch_size: pictures at once.
        arguments: of the call, such as `num_optimization_steps`.
    """
    device = next((tensor.device for tensor in (*judge.parameters(), *judge.buffers())), None)

    def judged(settings: dict[str, float]) -> float:
        values = []
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
            options = {
                "preset": "sphere",
                "optimizer_kwargs": settings,
                "generator": generators,
                "output_type": "pt",
                **arguments,
            }
            images = pipe(texts, **options).images.float()
            with torch.no_grad():
                values.append(judge(images if device is None else images.to(device), texts).cpu())
        return float(torch.cat(values).mean())

    return judged
