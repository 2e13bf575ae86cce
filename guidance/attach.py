"""Any guidance rule in any pipeline: ``with attach(pipe, guider): pipe(...)``.

A classic pipeline runs as it is. Its denoiser is watched, so that the conditional and unconditional
predictions are known; and its scheduler's ``step`` receives the rule's result in place of the pipeline's own
combination. ``step`` also knows the noisy latent, unscaled, which denoised predictions need. Nothing of a
pipeline is copied, and removal leaves nothing behind. Modular pipelines: see ``modular``.
"""

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders.guider_utils import BaseGuidance

from trimtab.pipelines.families import FAMILIES, Family

from .base import UNCOND, Guidance
from .handle import Attachment
from .interception import InterceptedModule, intercept_method, unwrapped
from .modular import ModularAttachment, check_modular
from .perturbation import Rows
from .run import GuidedRun

__all__ = ["Attachment", "attach"]


def attach(
    pipe: DiffusionPipeline | ModularPipeline,
    guider: BaseGuidance,
    *,
    renormalize: bool | None = None,
    batch_extra: bool = True,
) -> "Attachment":
    """Puts a guidance rule into a pipeline until the handle is removed.

    In a modular pipeline ``guider`` takes the place of its guider components, and the loop tells it the noisy
    latents and their noise level, so that every rule works as in classic pipelines. Without ``attach``,
    ``pipe.update_components(guider=guider)`` does for rules that need neither. FLUX.1's modular pipeline has no
    guider and is refused; the classic one with ``true_cfg_scale`` isn't.

    In a classic pipeline the guider's scale holds. The pipeline's own only switches the unconditional prediction
    on, so call the pipeline with ``guidance_scale > 1`` (FLUX.1 and Qwen-Image: ``true_cfg_scale > 1`` and a
    negative prompt); its own ``guidance_rescale`` has no effect. Compile the denoiser before attaching, not after.

    A step that isn't guided (w = 1, outside an interval) costs the conditional half alone, in every family. Only the
    first step of image-to-image, inpainting and ControlNet runs may compute both halves for nothing: until the
    scheduler's first step it isn't known where such a run starts.

    Args:
        pipe: a pipeline whose class is in ``trimtab.pipelines.families.FAMILIES``, classic or modular.
        guider: a guider from here, or one of Diffusers' own on conditional and unconditional predictions.
        renormalize: whether the result gets the conditional prediction's norm, for each vector of the last
            dimension, as Qwen-Image and Lumina 2 do after their own guidance. None does what the family does
            by default; pass False if you call Lumina 2 with ``cfg_normalization=False``. Modular pipelines take
            None alone: Qwen-Image's does it by itself.
        batch_extra: for rules with a third, weakened prediction: True computes it in the conditional one's call, on
            a batch by one part larger; False in a call of its own, with less memory. Modular pipelines always
            call once for each prediction.

    Returns:
        A handle with ``remove()`` that is also a context manager.

    Raises:
        NotImplementedError: for a pipeline without classifier-free guidance or of an unknown class, or a rule that
            can't be followed in it.
        TypeError: if ``guider`` is no guider.
        ValueError: if the guider needs other predictions than these two, or if it, the denoiser or the
            scheduler is attached already.

    Example:
        >>> from diffusers import StableDiffusion3Pipeline                          # doctest: +SKIP
        >>> with attach(pipe, AdaptiveProjectedGuidance(10.0)):                     # doctest: +SKIP
        ...     image = pipe("a cat", guidance_scale=10.0).images[0]
    """
    if isinstance(pipe, ModularPipeline):
        _check_guider(guider)
        check_modular(pipe, guider, renormalize)
        return ModularAttachment(pipe, guider)
    family = _family_of(pipe)
    if family.guidance.refusal is not None:
        raise NotImplementedError(f"{type(pipe).__name__} can't be guided: {family.guidance.refusal}")
    _check_guider(guider)
    _check_networks(pipe, family, guider)
    if renormalize is None:
        renormalize = family.guidance.renormalized
    return ClassicAttachment(pipe, guider, family, renormalize=renormalize, batch_extra=batch_extra)


def _family_of(pipe: object) -> Family:
    """The table's entry for a pipeline of any task: text-to-image, or one of the family's variants."""
    by_name = {name: entry for entry in FAMILIES for name in (*entry.pipelines, *entry.guidance.variants)}
    for base in type(pipe).__mro__:
        if base.__name__ in by_name:
            return by_name[base.__name__]
    raise NotImplementedError(f"`pipe` is a {type(pipe).__name__}; takes {', '.join(by_name)}")


def _is_one_of(pipe: object, names: tuple[str, ...]) -> bool:
    return any(base.__name__ in names for base in type(pipe).__mro__)


def _check_guider(guider: object) -> None:
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"`guider` must be a BaseGuidance, got {type(guider).__name__}")
    if isinstance(guider, Guidance):
        return
    extra = set(guider._input_predictions) - {"pred_cond", "pred_uncond"}
    if extra or type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"`guider` {type(guider).__name__} changes the denoiser itself; attach() takes rules on "
            "conditional and unconditional predictions, and those of trimtab.guidance"
        )


def _check_networks(pipe: DiffusionPipeline, family: Family, guider: BaseGuidance) -> None:
    """Consistency models and the like take the guidance scale as an input: their pipelines never predict twice."""
    if UNCOND not in (guider.may_want if isinstance(guider, Guidance) else guider._input_predictions):
        return
    for name in family.denoisers:
        size = getattr(getattr(getattr(pipe, name, None), "config", None), "time_cond_proj_dim", None)
        if size is not None:
            raise NotImplementedError(
                f"{type(pipe).__name__} can't be guided: its `{name}` takes the guidance scale as an input "
                f"(time_cond_proj_dim={size}), so whatever `guidance_scale` is there is no unconditional prediction"
            )


class ClassicAttachment(Attachment):
    """A guider in a classic pipeline."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        guider: BaseGuidance,
        family: Family,
        *,
        renormalize: bool,
        batch_extra: bool,
    ):
        super().__init__(guider)
        rows = Rows()
        self._run = GuidedRun(
            pipe,
            guider,
            family,
            renormalize=renormalize,
            whole=_is_one_of(pipe, family.pipelines),
            rows=rows,
            batch_extra=batch_extra,
        )
        self._undo_scheduler: list[Callable[[], None]] = []
        parts = {name: getattr(pipe, name, None) for name in family.denoisers}
        denoisers = {name: part for name, part in parts.items() if part is not None}
        self._denoisers: dict[str, InterceptedModule] = {}
        self._claim([unwrapped(denoiser) for denoiser in denoisers.values()] + [guider])
        try:
            self._follow_scheduler()
            for name, denoiser in denoisers.items():
                if isinstance(guider, Guidance):
                    self._undo.append(guider.install(denoiser, rows))
                self._denoisers[name] = InterceptedModule(denoiser, self._before, self._run.after)
                self._undo.append(self._denoisers[name].undo)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for undo in self._undo_scheduler:
            undo()
        self._undo_scheduler = []
        super().remove()
        self._run.begin(None)

    def _before(self, module: InterceptedModule, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._follow_scheduler()
        return self._run.before(module, args, kwargs)

    def _follow_scheduler(self) -> None:
        """Watches the pipeline's scheduler, which may have been exchanged since the last call."""
        scheduler, last = self._run.pipe.scheduler, self._run.scheduler
        if scheduler is last:
            return
        for undo in self._undo_scheduler:
            undo()
        self._undo_scheduler = []
        if last is not None:
            self._release([last])
        self._claim([scheduler])
        self._run.begin(scheduler)
        self._undo_scheduler = [
            intercept_method(scheduler, "set_timesteps", self._set_timesteps),
            intercept_method(scheduler, "step", self._run.step),
        ]

    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name, denoiser in self._denoisers.items():
            if not denoiser.sees(getattr(self._run.pipe, name)):
                raise RuntimeError(f"`{name}` was exchanged or compiled since the guider was attached: attach it anew")
        result = original(*args, **kwargs)
        self._run.begin(self._run.scheduler)
        return result
