"""What all guiders here share: Diffusers' protocol, the active window, and the noisy latent that x0 needs."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState

from .prediction import AffinePrediction

__all__ = ["COND", "UNCOND", "WEAK", "Guidance", "Scale"]

COND, UNCOND, WEAK = "pred_cond", "pred_uncond", "pred_cond_skip"
"""Names of predictions, as in Diffusers: the last is the conditional one of a weakened model."""

Scale = float | Callable[[float], float]
"""A guidance scale w: a number, or w(sigma) with the scheduler's sigma (noise level of the latents)."""


@dataclass(frozen=True)
class _Expected:
    """What ``expect`` told of the next evaluation."""

    step: int
    num_steps: int
    begins_step: bool
    sample: tuple[torch.Tensor, AffinePrediction | None, AffinePrediction | None]


class Guidance(BaseGuidance):
    """A guidance rule of conditional and unconditional predictions.

    It follows Diffusers' guider protocol, so one object serves modular pipelines as a component and classic
    pipelines through ``trimtab.guidance.attach``. A rule implements ``combine``; calls go

        set_state(step, ...)      once a step, also step == 0 at the start of a run
        set_sample(x, prediction) before each evaluation, where latents are known (``attach`` does)
        forward(pred_cond, pred_uncond)

    Modular pipelines call ``set_state`` themselves and tell no latents: there ``expect`` comes before, from
    ``NoisyLatentsStep`` (which ``attach`` puts into the loop).

    Args:
        guidance_scale: w, or a callable w(sigma); 1 means no guidance. A callable can't be saved.
        start: share of the steps after which guidance starts, in [0, 1).
        stop: share of the steps after which it stops, in [start, 1].
        enabled: whether it guides at all.

    Raises:
        ValueError: if a number is out of range or not finite.
    """

    _input_predictions = [COND, UNCOND]
    needs_sample = False
    """Whether ``combine`` needs ``set_sample`` first."""
    needs_pictures = False
    """Whether ``combine`` needs latents with height and width, not tokens."""

    def __init__(self, guidance_scale: Scale, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        if not callable(guidance_scale):
            check_finite("guidance_scale", guidance_scale, low=0.0)
        note = logging.getLogger("diffusers.guiders.guider_utils")
        level = note.level
        note.setLevel(logging.ERROR)  # "guiders are experimental", once for each guider made
        try:
            super().__init__(start, stop, enabled)
        finally:
            note.setLevel(level)
        self.guidance_scale = guidance_scale
        self._expected: _Expected | None = None
        self.set_sample(None, None)

    # ---- state ---------------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor | float | None) -> None:
        """Begins a step. Step 0 begins a run and drops what an earlier one left behind."""
        expected, self._expected = self._expected, None
        if expected is not None:
            step, num_inference_steps = expected.step, expected.num_steps
        super().set_state(step, num_inference_steps, timestep)
        if expected is None or expected.begins_step:
            if step == 0:
                self.reset()
            else:
                self.next_step()
        self.set_sample(*((None, None) if expected is None else expected.sample))

    def expect(
        self,
        step: int,
        num_steps: int,
        begins_step: bool,
        sample: torch.Tensor,
        prediction: AffinePrediction | None,
        next_prediction: AffinePrediction | None,
    ) -> None:
        """Tells of the evaluation that the next ``set_state``, called by others, begins.

        Args:
            step: from 0; holds in place of the one that ``set_state`` gets, which counts evaluations.
            num_steps: of the run; holds likewise.
            begins_step: False for a solver's further evaluations within a step.
            sample, prediction, next_prediction: as ``set_sample`` takes them.
        """
        self._expected = _Expected(step, num_steps, begins_step, (sample, prediction, next_prediction))

    def set_sample(
        self,
        sample: torch.Tensor | None,
        prediction: AffinePrediction | None,
        next_prediction: AffinePrediction | None = None,
    ) -> None:
        """Tells the noisy latent of the next evaluation and how predictions become x0 there.

        Args:
            sample: the latent as the scheduler's ``step`` takes it; None forgets it.
            prediction: the conversion at this noise level.
            next_prediction: the conversion at the noise level where the step ends, for rules that need it.
        """
        self._sample, self._prediction, self._next_prediction = sample, prediction, next_prediction

    def reset(self) -> None:
        """Forgets what earlier steps left in the rule. Most rules keep nothing."""

    def next_step(self) -> None:
        """A step after the first begins."""

    def release(self) -> None:
        """Forgets the run: tensors of an earlier one are kept no longer."""
        self._expected = None
        self.reset()
        self.set_sample(None, None)

    @property
    def scale(self) -> float:
        """w at this step.

        Raises:
            RuntimeError: if w is a function of sigma and no noise level was told.
            ValueError: if that function gives no finite number.
        """
        if not callable(self.guidance_scale):
            return self.guidance_scale
        w = float(self.guidance_scale(self.sigma))
        if not math.isfinite(w):
            raise ValueError(f"`guidance_scale` gave {w} at sigma={self.sigma:g}; it must give a finite number")
        return w

    @property
    def sigma(self) -> float:
        """The noise level of this evaluation: sigma / alpha, or the time from 1 to 0 of flow matching."""
        if self._prediction is None:
            raise RuntimeError(f"{type(self).__name__} needs the noise level: use attach(), or call set_sample()")
        return self._prediction.level

    @property
    def guides(self) -> bool:
        """Whether some step of a run may be guided: enabled, w not always 1."""
        return self._enabled and (callable(self.guidance_scale) or self.guidance_scale != 1.0)

    @property
    def is_guided(self) -> bool:
        """Whether this step is guided: enabled, inside the window, w not 1."""
        if not self.guides or not self.in_window:
            return False
        return not callable(self.guidance_scale) or self._prediction is None or self.scale != 1.0

    @property
    def in_window(self) -> bool:
        """Whether this step lies between ``start`` and ``stop``: int(start * N) <= i < int(stop * N)."""
        if self._num_inference_steps is None:
            return True
        first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return first <= self._step < last

    # ---- Diffusers' protocol -------------------------------------------------------------------------------

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def wanted(self) -> list[str]:
        """The predictions that this step takes, in the order of ``forward``'s arguments."""
        return [COND, UNCOND] if self.is_guided else [COND]

    @property
    def may_want(self) -> list[str]:
        """The predictions that some step of a run may take."""
        return [COND, UNCOND] if self.guides else [COND]

    @property
    def num_conditions(self) -> int:
        """How many predictions some step of a run may take.

        Modular pipelines ask before a run whether a negative prompt is needed; the step at which an earlier run
        ended must not count then.
        """
        return len(self.may_want)

    def __call__(self, data: list[BlockState]) -> GuiderOutput:
        """Applies the rule to the predictions of this step, the ``noise_pred`` of what ``prepare_inputs`` gave.

        Raises:
            ValueError: if they aren't those that this step takes.
        """
        predictions = {getattr(batch, self._identifier_key): getattr(batch, "noise_pred", None) for batch in data}
        if list(predictions) != self.wanted or any(value is None for value in predictions.values()):
            given = [name for name, value in predictions.items() if value is not None]
            raise ValueError(f"`data` must have the predictions {self.wanted}, got {given}")
        return self.forward(**{name: self._of_sample(value) for name, value in predictions.items()})

    def _of_sample(self, prediction: torch.Tensor) -> torch.Tensor:
        """Without the tokens of a reference picture, which some pipelines drop after guidance only."""
        if self._sample is None or self._sample.ndim != prediction.ndim:
            return prediction
        for dim, size in enumerate(self._sample.shape):
            if prediction.shape[dim] > size:
                prediction = prediction.narrow(dim, 0, size)
        return prediction

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[BlockState]:
        self._check_negative([pair for pair in data.values() if isinstance(pair, tuple)], bool(data))
        return [self._prepare_batch(data, int(name == UNCOND), name) for name in self.wanted]

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[BlockState]:
        pairs = [names for names in input_fields.values() if isinstance(names, tuple)]
        self._check_negative([tuple(getattr(data, name, None) for name in names) for names in pairs], bool(pairs))
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(name == UNCOND), name) for name in self.wanted
        ]

    def _check_negative(self, pairs: list[tuple], conditioned: bool) -> None:
        """A run without unconditional inputs would take the conditional ones twice, and guide nothing."""
        if conditioned and UNCOND in self.wanted and all(pair[1] is None for pair in pairs):
            raise ValueError(
                f"{type(self).__name__} needs an unconditional prediction, and this run has no inputs for it: pass "
                "negative_prompt='' or negative_prompt_embeds"
            )

    def install(self, denoiser: torch.nn.Module, rows: Any) -> Callable[[], None]:
        """Prepares a denoiser for weakened rows of its batch; returns the function that undoes it.

        Args:
            denoiser: the network.
            rows: ``trimtab.guidance.run.Rows``, which tells at each call which rows those are.
        """
        return lambda: None

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Applies the rule.

        Args:
            pred_cond: the conditional prediction, batch first.
            pred_uncond: the unconditional one, same shape; None where this step isn't guided.

        Returns:
            GuiderOutput with ``pred`` of the same shape and dtype.

        Raises:
            ValueError: if the shapes differ.
        """
        pred = pred_cond
        if pred_uncond is not None and self.is_guided:
            if pred_cond.shape != pred_uncond.shape:
                raise ValueError(
                    f"`pred_cond` and `pred_uncond` must have one shape, got {tuple(pred_cond.shape)} and "
                    f"{tuple(pred_uncond.shape)}"
                )
            pred = self.combine(pred_cond, pred_uncond)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        """The rule itself, for a guided step."""
        raise NotImplementedError

    def to_json_string(self) -> str:
        for name, value in self.config.items():
            if callable(value):
                raise ValueError(f"`{name}` is a function and can't be saved in {self.config_name}")
        return super().to_json_string()


def check_finite(name: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises ValueError unless ``value`` is a finite number in [low, high]."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        span = f" in [{low:g}, {high:g}]" if math.isfinite(low) or math.isfinite(high) else ""
        raise ValueError(f"`{name}` must be a finite number{span}, got {value!r}")
