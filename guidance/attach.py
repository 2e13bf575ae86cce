"""Any guidance rule in any classic pipeline: ``with attach(pipe, guider): pipe(...)``.

The stock pipeline runs as it is. Its denoiser is watched, so that the conditional and unconditional
predictions are known; and its scheduler's ``step`` receives the rule's result in place of the pipeline's own
combination. ``step`` also knows the noisy latent, unscaled, which denoised predictions need. Nothing of a
pipeline is copied, and removal leaves nothing behind.
"""

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance

from trimtab.pipelines.families import FAMILIES, Family

from .base import Guidance
from .interception import intercept_method, intercept_module, unwrapped
from .prediction import NoiseSchedule

__all__ = ["Attachment", "attach"]

_lock = threading.Lock()
_attached: "weakref.WeakSet[Any]" = weakref.WeakSet()  # denoisers, schedulers and guiders in use


def attach(pipe: DiffusionPipeline, guider: BaseGuidance, *, renormalize: bool | None = None) -> "Attachment":
    """Puts a guidance rule into a classic pipeline until the handle is removed.

    The guider's scale holds. The pipeline's own only switches the unconditional prediction on, so call the
    pipeline with ``guidance_scale > 1`` (FLUX.1 and Qwen-Image: ``true_cfg_scale > 1`` and a negative
    prompt); its own ``guidance_rescale`` has no effect. Compile the denoiser before attaching, not after.

    Args:
        pipe: a pipeline whose class is in ``trimtab.pipelines.families.FAMILIES``.
        guider: a guider from here, or one of Diffusers' own on conditional and unconditional predictions.
        renormalize: whether the result gets the conditional prediction's norm, for each vector of the last
            dimension, as Qwen-Image and Lumina 2 do after their own guidance. None does what the family does
            by default; pass False if you call Lumina 2 with ``cfg_normalization=False``.

    Returns:
        A handle with ``remove()`` that is also a context manager.

    Raises:
        NotImplementedError: for a pipeline without classifier-free guidance, or of an unknown class.
        TypeError: if ``guider`` is no guider.
        ValueError: if the guider needs other predictions than these two, or if it, the denoiser or the
            scheduler is attached already.

    Example:
        >>> from diffusers import StableDiffusion3Pipeline                          # doctest: +SKIP
        >>> with attach(pipe, AdaptiveProjectedGuidance(10.0)):                     # doctest: +SKIP
        ...     image = pipe("a cat", guidance_scale=10.0).images[0]
    """
    family = _family_of(pipe)
    if family.guidance.refusal is not None:
        raise NotImplementedError(f"{type(pipe).__name__} can't be guided: {family.guidance.refusal}")
    _check_guider(guider)
    return Attachment(pipe, guider, family, renormalize)


def _family_of(pipe: object) -> Family:
    """The table's entry for a pipeline of any task: text-to-image, or one of the family's variants."""
    by_name = {name: entry for entry in FAMILIES for name in (*entry.pipelines, *entry.guidance.variants)}
    for base in type(pipe).__mro__:
        if base.__name__ in by_name:
            return by_name[base.__name__]
    raise NotImplementedError(f"`pipe` is a {type(pipe).__name__}; takes {', '.join(by_name)}")


def _check_guider(guider: object) -> None:
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"`guider` must be a BaseGuidance, got {type(guider).__name__}")
    extra = set(guider._input_predictions) - {"pred_cond", "pred_uncond"}
    if extra or type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"`guider` {type(guider).__name__} changes the denoiser itself; attach() takes rules on "
            "conditional and unconditional predictions"
        )


class Attachment:
    """A guider in a pipeline: the handle that ``attach`` returns."""

    def __init__(
        self, pipe: DiffusionPipeline, guider: BaseGuidance, family: Family, renormalize: bool | None
    ):
        self._pipe, self._guider, self._family, self._traits = pipe, guider, family, family.guidance
        self._renormalize = self._traits.renormalized if renormalize is None else renormalize
        self._scheduler: Any = None
        self._undo_scheduler: list[Any] = []
        self._undo_denoisers: list[Any] = []
        denoisers = [
            getattr(pipe, name) for name in family.denoisers if getattr(pipe, name, None) is not None
        ]
        self._claimed = [unwrapped(denoiser) for denoiser in denoisers] + [guider]
        with _lock:
            for item in self._claimed:
                if item in _attached:
                    raise ValueError(
                        f"`{type(item).__name__}` is attached already; remove that attachment first"
                    )
            _attached.update(self._claimed)
        try:
            self._follow_scheduler()
            for denoiser in denoisers:
                self._undo_denoisers.append(
                    intercept_module(denoiser, self._before_denoiser, self._after_denoiser)
                )
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def attached(self) -> bool:
        """Whether the guider is in the pipeline."""
        return bool(self._undo_denoisers)

    def remove(self) -> None:
        """Takes the guider out; the pipeline is as it was. A second call does nothing."""
        for undo in [*self._undo_denoisers, *self._undo_scheduler]:
            undo()
        self._undo_denoisers, self._undo_scheduler = [], []
        self._outputs: list[Any] = []
        if isinstance(self._guider, Guidance):
            self._guider.reset()
            self._guider.set_sample(None, None)
        with _lock:
            for item in [*self._claimed, self._scheduler]:
                if item is not None:
                    _attached.discard(item)
        self._claimed, self._scheduler = [], None

    # ---- the run -------------------------------------------------------------------------------------------

    def _follow_scheduler(self) -> None:
        """Watches the pipeline's scheduler; it may have been exchanged since the last call."""
        scheduler = self._pipe.scheduler
        if scheduler is self._scheduler:
            return
        for undo in self._undo_scheduler:
            undo()
        self._undo_scheduler = []
        with _lock:
            if self._scheduler is not None:
                _attached.discard(self._scheduler)
            if scheduler in _attached:
                self._scheduler = None
                raise ValueError(
                    f"`{type(scheduler).__name__}` of this pipeline is attached through another one"
                )
            _attached.add(scheduler)
        self._scheduler = scheduler
        self._undo_scheduler = [
            intercept_method(scheduler, "set_timesteps", self._set_timesteps),
            intercept_method(scheduler, "step", self._step),
        ]
        self._begin_run()

    def _set_timesteps(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._begin_run()
        return result

    def _begin_run(self) -> None:
        self._schedule: NoiseSchedule | None = None
        self._first: int | None = None  # index of the run's first step among the scheduler's timesteps
        self._evaluation = 0
        self._outputs = []
        self._was_guided = False

    def _before_denoiser(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._follow_scheduler()
        if self._evaluation == 0 and not self._outputs:
            self._guider.set_state(0, len(self._scheduler.timesteps), None)
            if not getattr(self._pipe, "do_classifier_free_guidance", True):
                self._check_switched_on()
        return args, kwargs

    def _after_denoiser(self, output: Any) -> Any:
        self._outputs.append(output[0] if isinstance(output, tuple) else output.sample)
        return output

    def _check_switched_on(self) -> None:
        if self._guider.num_conditions > 1:
            raise ValueError(
                f"{type(self._pipe).__name__} makes no unconditional prediction: call it with "
                f"{self._traits.switch}"
            )

    def _step(
        self,
        original: Any,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> Any:
        outputs, self._outputs = self._outputs, []
        if not outputs:  # the scheduler serves another pipeline besides
            return original(model_output, timestep, sample, *args, **kw)
        cond, uncond = self._split(outputs, model_output, sample)
        guided = self._guide(cond, uncond, timestep, sample)
        self._evaluation += 1
        return original(guided.to(model_output.dtype), timestep, sample, *args, **kw)

    # ---- one evaluation ------------------------------------------------------------------------------------

    def _split(
        self, outputs: list[Any], model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's outputs as the scheduler would get them: conditional, unconditional."""
        parts: list[torch.Tensor]
        if self._traits.calls == "batched":
            whole = outputs[0]
            whole = torch.stack(list(whole)) if isinstance(whole, (list, tuple)) else whole
            if whole.shape[0] == 2 * model_output.shape[0]:
                parts = list(whole.chunk(2))
                parts = parts if self._traits.conditional_first else parts[::-1]
            else:
                parts = [whole]
        else:
            parts = list(outputs[:2])
        parts = [self._as_prediction(part, model_output) for part in parts]
        return parts[0], parts[1] if len(parts) > 1 else None

    def _as_prediction(self, output: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """In the scheduler's sign and dtype, without the channels (variance) or tokens (a reference picture)
        that the pipeline drops."""
        if output.ndim != model_output.ndim:
            output = output.reshape(model_output.shape)
        for dim, size in enumerate(model_output.shape):
            if output.shape[dim] > size:
                output = output.narrow(dim, 0, size)
        output = output.to(model_output.dtype)
        return -output if self._traits.negated else output

    def _guide(
        self, cond: torch.Tensor, uncond: torch.Tensor | None, timestep: Any, sample: torch.Tensor
    ) -> torch.Tensor:
        guider, scheduler = self._guider, self._scheduler
        index = self._index(timestep)
        order = getattr(scheduler, "order", 1)
        if self._evaluation % order == 0:
            steps = -(-(len(scheduler.timesteps) - self._first) // order)
            guider.set_state(self._evaluation // order, steps, timestep)
        if isinstance(guider, Guidance):
            self._tell_sample(guider, index, sample)
        if uncond is None and guider.num_conditions > 1:
            if not self._was_guided:
                self._check_switched_on()
            return cond  # the pipeline itself ends guidance early (cfg_trunc_ratio and the like)
        self._was_guided = self._was_guided or uncond is not None
        batches = guider.prepare_inputs({})
        for batch, prediction in zip(batches, (cond, uncond), strict=False):
            batch.noise_pred = prediction
        guided = guider(batches).pred
        if self._renormalize and uncond is not None:
            norms = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (cond, guided)]
            guided = guided * (norms[0] / norms[1])
        return guided

    def _tell_sample(self, guider: Guidance, index: int, sample: torch.Tensor) -> None:
        if self._schedule is None:
            try:
                self._schedule = NoiseSchedule(self._scheduler)
            except NotImplementedError:
                if guider.needs_sample:
                    raise
                return
        guider.set_sample(sample, self._schedule[index], self._schedule[index + 1])

    def _index(self, timestep: Any) -> int:
        """Which of the scheduler's timesteps this is, read from the device at most once a run."""
        scheduler = self._scheduler
        if hasattr(scheduler, "_init_step_index"):
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)  # what its step() would do first
            index = scheduler.step_index
            if self._first is None:
                self._first = index - self._evaluation
            return index
        if self._first is None:
            self._schedule = NoiseSchedule(scheduler)
            self._first = self._schedule.index_of(timestep)
        return self._first + self._evaluation
