"""What happens to a pipeline's denoiser and scheduler while a guider is attached, call by call."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance

from trimtab.pipelines.families import Family
from trimtab.pipelines.latents import from_tokens, to_tokens

from .base import COND, UNCOND, WEAK, Guidance
from .batching import batch_rows, halves_equal, join, output_value, replace_output, split, take_rows, token_grid
from .interception import InterceptedModule
from .perturbation import Rows
from .progress import RunProgress

__all__ = ["GuidedRun"]


@dataclass
class _Call:
    """One call of the denoiser: what the pipeline expects of it, in order, and what is computed instead."""

    expected: list[str]
    computed: list[str]
    inputs: tuple[tuple, dict] = field(default=((), {}))


class GuidedRun:
    """Follows the calls of a pipeline's denoiser and scheduler and puts the guider between them.

    A scheduler's step ends an evaluation; ``order`` evaluations make a step. The state is dropped when timesteps
    are set anew.

    Args:
        pipe: the pipeline.
        guider: the rule.
        family: the pipeline's.
        renormalize: whether results get the conditional prediction's norm along the last dimension.
        whole: whether the pipeline's runs begin at the scheduler's first timestep, as text-to-image ones do.
        rows: shared with the guider's perturbations of the denoiser.
        batch_extra: whether a weakened prediction shares the conditional one's call.
    """

    def __init__(
        self,
        pipe: Any,
        guider: BaseGuidance,
        family: Family,
        *,
        renormalize: bool,
        whole: bool,
        rows: Rows,
        batch_extra: bool,
    ):
        self.pipe, self.guider, self.traits, self.patch = pipe, guider, family.guidance, family.patch
        self.renormalize, self.whole, self.rows, self.batch_extra = renormalize, whole, rows, batch_extra
        self.begin(None)

    def begin(self, scheduler: Any) -> None:
        """A new run, with this scheduler."""
        self.scheduler = scheduler
        self._progress = RunProgress(scheduler, whole=self.whole)
        self._batch: int | None = None
        self._grid: tuple[int, int] | None = None
        self._had_uncond = False
        self._skipping: InterceptedModule | None = None
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        self._calls = 0
        self._call: _Call | None = None
        self._predictions: dict[str, Any] = {}
        self._busy = False
        self.rows.start = None
        if self._skipping is not None:  # the pipeline made no second call
            self._skipping.run_next()
            self._skipping = None

    # ---- the denoiser --------------------------------------------------------------------------------------

    def before(self, module: InterceptedModule, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Chooses what this call of the denoiser computes."""
        if self._busy:
            return args, kwargs
        if self._calls == 0:
            self._begin_evaluation()
        expected = self._expected(args, kwargs)
        self._calls += 1
        if expected is None:
            self._call = None
            return args, kwargs
        switched_on = getattr(self.pipe, "do_classifier_free_guidance", True)
        if UNCOND in self._wanted and self._certain and not switched_on:
            self._refuse()
        computed = [name for name in expected if name in (COND, *self._wanted) or not self._certain]
        if not computed:  # a second call that isn't needed; skip_next answers it
            self._call = None
            return args, kwargs
        if COND in expected and WEAK in self._wanted and self.batch_extra and self._weak_model is None:
            computed.append(WEAK)
        self._call = _Call(expected, computed, (args, kwargs))
        if self._grid is None and getattr(self.guider, "needs_pictures", False):
            self._grid = token_grid(args, kwargs)
        size = batch_rows(args, kwargs) // len(expected)
        self.rows.total = size * len(computed)
        self.rows.start = size * (len(computed) - 1) if WEAK in computed else None
        if computed != expected:
            args, kwargs = self._take(computed)
        return args, kwargs

    def after(self, module: InterceptedModule, output: Any) -> Any:
        """Keeps the predictions and gives the pipeline as many as it expects."""
        call = self._call
        if self._busy or call is None:
            return output
        self._call, self.rows.start = None, None
        parts = dict(zip(call.computed, split(output_value(output), len(call.computed)), strict=True))
        if COND in parts and WEAK in self._wanted and WEAK not in parts:
            parts[WEAK] = self._weak_prediction(module.module, call)
        self._predictions.update(parts)
        if call.computed != call.expected:
            output = replace_output(output, join([parts.get(name, parts[COND]) for name in call.expected]))
        later = self.traits.calls == "separate" and COND in call.expected
        if later and self._certain and UNCOND not in self._wanted:
            module.skip_next(output)
            self._skipping = module
        return output

    def _take(self, names: list[str], call: _Call | None = None) -> tuple[tuple, dict]:
        call = call or self._call
        size = batch_rows(*call.inputs) // len(call.expected)
        places = [call.expected.index(COND if name == WEAK else name) * size for name in names]
        blocks = [slice(place, place + size) for place in places]
        return take_rows(*call.inputs, blocks, self.traits.unbatched)

    def _weak_prediction(self, denoiser: torch.nn.Module, call: _Call) -> Any:
        """The weakened model's conditional prediction, by a call of its own."""
        args, kwargs = self._take([COND], call)
        self._busy = True
        try:
            if self._weak_model is not None:
                return output_value(self._weak_model(*args, **kwargs))
            self.rows.start, self.rows.total = 0, batch_rows(args, kwargs)
            return output_value(denoiser(*args, **kwargs))
        finally:
            self._busy, self.rows.start = False, None

    @property
    def _weak_model(self) -> torch.nn.Module | None:
        return getattr(self.guider, "weak_denoiser", None)

    def _expected(self, args: tuple, kwargs: dict) -> list[str] | None:
        """What the pipeline expects of this call; None for a call that guidance has nothing to do with."""
        if self.traits.calls == "separate":
            return [[COND], [UNCOND]][self._calls] if self._calls < 2 else None
        if self._calls:
            return None
        rows = batch_rows(args, kwargs)
        if self._batch is not None:
            paired = rows == 2 * self._batch
        else:
            paired = getattr(self.pipe, "do_classifier_free_guidance", None)
            paired = halves_equal(args, kwargs) if paired is None else paired
        if not paired:
            return [COND]
        return [COND, UNCOND] if self.traits.conditional_first else [UNCOND, COND]

    def _begin_evaluation(self) -> None:
        """Sets the guider's state before the denoiser runs, as far as it is known yet."""
        index = self._progress.known_index()
        self._certain = index is not None
        self._set_state(0 if index is None else index)
        self._tell_sample(index, None)
        self._wanted = self._names()
        if not self._certain:  # the first step may be any of the scheduler's: compute what could be needed
            self._wanted = self._may_want()

    # ---- the scheduler -------------------------------------------------------------------------------------

    def step(
        self,
        original: Any,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The scheduler's step with the rule's result in place of the pipeline's."""
        predictions = self._predictions
        if not predictions:  # the scheduler serves another pipeline besides
            return original(model_output, timestep, sample, *args, **kwargs)
        self._batch = sample.shape[0]
        predictions = {name: self._as_prediction(value, model_output) for name, value in predictions.items()}
        index = self._progress.index(timestep)
        if not self._certain:
            self._set_state(index)
        self._tell_sample(index, sample)
        guided = self._guide(predictions)
        self._end_evaluation()
        self._progress.evaluation += 1
        return original(guided.to(model_output.dtype), timestep, sample, *args, **kwargs)

    def _as_prediction(self, output: Any, model_output: torch.Tensor) -> torch.Tensor:
        """In the scheduler's sign and dtype, without the channels (variance) or tokens (a reference picture)
        that the pipeline drops."""
        if isinstance(output, (list, tuple)):
            output = torch.stack(list(output))
        if output.ndim != model_output.ndim:
            output = output.reshape(model_output.shape)
        for dim, size in enumerate(model_output.shape):
            if output.shape[dim] > size:
                output = output.narrow(dim, 0, size)
        output = output.to(model_output.dtype)
        return -output if self.traits.negated else output

    def _guide(self, predictions: dict[str, torch.Tensor]) -> torch.Tensor:
        names = self._names()
        if UNCOND in names and UNCOND not in predictions:
            if not self._had_uncond:
                self._refuse()
            return predictions[COND]  # the pipeline itself ends guidance early (cfg_trunc_ratio and the like)
        self._had_uncond = self._had_uncond or UNCOND in predictions
        batches = self.guider.prepare_inputs({})
        for batch, name in zip(batches, names, strict=True):
            batch.noise_pred = self._as_picture(predictions[name])
        guided = self.guider(batches).pred
        if self._grid is not None and predictions[COND].ndim == 3:
            guided = to_tokens(guided, self.patch)
        if self.renormalize and UNCOND in names:
            norms = [torch.linalg.vector_norm(p, dim=-1, keepdim=True) for p in (predictions[COND], guided)]
            guided = guided * (norms[0] / norms[1])
        return guided

    def _as_picture(self, prediction: torch.Tensor) -> torch.Tensor:
        """Tokens in their places, where the guider needs that."""
        if self._grid is None or prediction.ndim != 3:
            return prediction
        return from_tokens(prediction, self.patch, *(self.patch * size for size in self._grid))

    def _names(self) -> list[str]:
        """The predictions that the guider takes at this evaluation."""
        if isinstance(self.guider, Guidance):
            return self.guider.wanted
        return list(self.guider._input_predictions)[: self.guider.num_conditions]

    def _may_want(self) -> list[str]:
        guider = self.guider
        return guider.may_want if isinstance(guider, Guidance) else list(guider._input_predictions)

    def _refuse(self) -> None:
        raise ValueError(
            f"{type(self.guider).__name__} needs an unconditional prediction, and this call of "
            f"{type(self.pipe).__name__} makes none: pass {self.traits.switch}"
        )

    # ---- where the run is ----------------------------------------------------------------------------------

    def _set_state(self, index: int) -> None:
        progress = self._progress
        if progress.begins_step:
            left = len(self.scheduler.timesteps) - index
            self.guider.set_state(
                progress.step, progress.step + -(-left // progress.order), self.scheduler.timesteps[index]
            )

    def _tell_sample(self, index: int | None, sample: torch.Tensor | None) -> None:
        if not isinstance(self.guider, Guidance):
            return
        levels = (None, None)
        if index is not None:
            levels = self._progress.predictions(index, required=self.guider.needs_sample)
        self.guider.set_sample(sample, *levels)
