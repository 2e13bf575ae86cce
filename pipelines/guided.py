"""Stock pipelines with a guidance rule of their own: what the thin ``guided_*.py`` files share.

Each of those files is a custom pipeline: ``custom_pipeline=`` loads it as it stands, and Diffusers then runs a copy
of it from its cache. So it imports this module by its full name, and it defines one pipeline class only.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance

from trimtab.guidance import AdaptiveProjectedGuidance, attach

from .families import FAMILIES
from .sharing import SharedComponentsMixin
from .vocabulary import warn_of_unknown_words

__all__ = ["GuidedPipelineMixin", "at_scale", "inner_guider"]

_NOTE = """{stock}'s own call, guided by a rule instead of its classifier-free guidance.

The arguments are those of the stock call, described below, and ``guider``. Options that shape the stock
guidance itself (such as ``guidance_rescale`` and ``skip_guidance_layers``) have no effect; there are rules for them.

Args:
    guider: the rule for this call, a guider of ``trimtab.guidance`` or one of Diffusers' own on conditional
        and unconditional predictions. None is the pipeline's own, ``pipe.guider``.
    {scale}: None leaves the guider's scale as it is. A number > 1 is the guider's scale for this call, a
        number <= 1 means no guidance: the stock call without its unconditional half.

Raises:
    TypeError: if ``guider`` is no guider.
    ValueError: if ``{scale}`` is not finite, or the guider has no one scale that it could set.

{doc}"""


class GuidedPipelineMixin(SharedComponentsMixin):
    """Makes a stock pipeline's call take ``guider=``, and the guider one of the pipeline's components.

    A class of pipelines is made by naming the mixin and the stock class, in this order, and the rule to begin with:

        class GuidedStableDiffusion3Pipeline(GuidedPipelineMixin, StableDiffusion3Pipeline):
            @classmethod
            def default_guider(cls):
                return AdaptiveProjectedGuidance.from_preset("sd3")

    The signatures of ``__init__`` and ``__call__`` are the stock ones and the guider. The stock code runs as it is,
    under ``trimtab.guidance.attach`` while a call lasts. ``save_pretrained`` saves the guider's config and
    ``from_pretrained`` restores it. ``from_pipe`` goes both ways and shares the components.

    Raises:
        NotImplementedError: where such a class is defined on a stock class without classifier-free guidance.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuidedPipelineMixin not in cls.__bases__:
            return  # a subclass of a guided pipeline has all of it
        stock = next((base for base in cls.__bases__ if issubclass(base, DiffusionPipeline)), None)
        name = getattr(stock, "__name__", "nothing")
        family = next((family for family in FAMILIES if name in family.pipelines), None)
        if family is None or family.guidance.refusal is not None:
            reason = "is no stock pipeline known here" if family is None else family.guidance.refusal
            raise NotImplementedError(f"{cls.__name__} can't be guided: its stock class {name}: {reason}")
        cls._optional_components = [*stock._optional_components, "guider"]
        cls.__init__ = _with_guider(stock)
        cls.__call__ = _guided(stock)

    @classmethod
    def default_guider(cls) -> BaseGuidance:
        """A new guider as the pipeline has it when none is given."""
        return AdaptiveProjectedGuidance()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A guided pipeline of the components of a pipeline in memory: shared, neither copied nor converted.

        The way back is the stock class's ``from_pipe``, which converts the components to ``dtype`` where they
        are, float32 if none is given: pass ``dtype=pipe.dtype``.

        Args:
            pipeline: of the same family, guided or not. A guided one's guider is shared, too.
            kwargs: ``guider``, other components that replace the pipeline's, ``dtype``; as in Diffusers.

        Raises:
            TypeError: if ``guider`` is no guider.
            ValueError: if the pipeline lacks a component.
        """
        kwargs.setdefault("guider", getattr(pipeline, "guider", None))
        return super().from_pipe(pipeline, **kwargs)

    def _guider_for(self, guider: BaseGuidance, arguments: dict[str, Any], scale: str) -> BaseGuidance:
        """The guider that a call uses, after the call's own scale."""
        value = arguments.get(scale)
        return guider if value is None else at_scale(guider, value)


def inner_guider(guider: BaseGuidance) -> BaseGuidance:
    """The rule inside wrappers such as ``GuidanceRescale``, or the guider itself."""
    inner = vars(guider).get("guider")
    return inner_guider(inner) if isinstance(inner, BaseGuidance) else guider


def at_scale(guider: BaseGuidance, guidance_scale: float | Callable[[float], float]) -> BaseGuidance:
    """A copy of a guider with another scale.

    Args:
        guider: any guider whose config has a ``guidance_scale``, or a wrapper of one.
        guidance_scale: in the range that the guider takes.

    Raises:
        ValueError: if the guider has no one scale, or doesn't take this one.

    Example:
        >>> at_scale(AdaptiveProjectedGuidance(10.0, eta=0.5), 7.0).config.eta
        0.5
    """
    inner = vars(guider).get("guider")
    if isinstance(inner, BaseGuidance):
        return guider.new(guider=at_scale(inner, guidance_scale))
    config = getattr(guider, "_internal_dict", {})  # guiders of somebody's own may have none
    if "guidance_scale" not in config or config.get("guidance_scales") is not None:
        raise ValueError(
            f"`guidance_scale` can't set the scale of a {type(guider).__name__}: make the guider as you want it and "
            "leave `guidance_scale` away"
        )
    weak = getattr(guider, "weak_denoiser", None)  # a model: it isn't in the config
    return guider.new(guidance_scale=guidance_scale, **({} if weak is None else {"weak_denoiser": weak}))


def _check_guider(guider: object) -> None:
    if not isinstance(guider, BaseGuidance):
        got = f"the class {guider.__name__}" if isinstance(guider, type) else f"a {type(guider).__name__}"
        raise TypeError(f"`guider` must be a guider (a BaseGuidance of trimtab.guidance or Diffusers), got {got}")


def _with_guider(stock: type) -> Callable[..., None]:
    """The stock class's ``__init__`` with ``guider``."""

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *args: Any, guider: BaseGuidance | None = None, **kwargs: Any) -> None:
        guider = self.default_guider() if guider is None else guider
        _check_guider(guider)
        stock.__init__(self, *args, **kwargs)
        self.register_modules(guider=guider)

    # Diffusers takes a parameter with a default for a setting, not for a component, when it is loading through
    # DiffusionPipeline: a saved guider would then win over the one that is passed. So none is shown.
    added = inspect.Parameter("guider", inspect.Parameter.KEYWORD_ONLY, annotation=BaseGuidance | None)
    __init__.__signature__ = _joined(inspect.signature(stock.__init__), added)
    __init__.__annotations__ = {**stock.__init__.__annotations__, "guider": BaseGuidance | None}
    return __init__


def _guided(stock: type) -> Callable[..., Any]:
    """The stock class's ``__call__`` with ``guider``, in ``torch.no_grad`` as there; ``__wrapped__`` is without."""
    inner = inspect.unwrap(stock.__call__)
    signature = inspect.signature(inner)
    scale = "true_cfg_scale" if "true_cfg_scale" in signature.parameters else "guidance_scale"

    def __call__(self: Any, *args: Any, guider: BaseGuidance | None = None, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        arguments = bound.arguments
        guider = self.guider if guider is None else guider
        guider = self.default_guider() if guider is None else guider
        _check_guider(guider)
        warn_of_unknown_words(self, arguments, stacklevel=3)  # one more frame: torch.no_grad()
        value = arguments.get(scale)
        if value is not None and not _finite(value):
            raise ValueError(f"`{scale}` must be a finite number or None, got {value!r}")
        if value is not None and value <= 1:
            return inner(*bound.args, **bound.kwargs)
        guider = self._guider_for(guider, arguments, scale)
        arguments[scale] = _switched_on(guider) if value is None else value
        if scale == "true_cfg_scale" and all(arguments.get(name) is None for name in _NEGATIVES):
            arguments["negative_prompt"] = _nothing(arguments)
        with attach(self, guider):
            return inner(*bound.args, **bound.kwargs)

    shown = signature.parameters[scale]
    parameters = [
        parameter.replace(default=None, annotation=float | None) if parameter is shown else parameter
        for parameter in signature.parameters.values()
    ]
    added = inspect.Parameter("guider", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=BaseGuidance | None)
    __call__.__signature__ = _joined(signature.replace(parameters=parameters), added)
    __call__.__annotations__ = {**inner.__annotations__, scale: float | None, "guider": BaseGuidance | None}
    __call__.__doc__ = _NOTE.format(stock=stock.__name__, scale=scale, doc=inspect.cleandoc(inner.__doc__ or ""))
    return torch.no_grad()(__call__)


_NEGATIVES = ("negative_prompt", "negative_prompt_embeds")


def _nothing(arguments: dict[str, Any]) -> str | list[str]:
    """A blank negative prompt for each prompt: such a pipeline makes no second prediction without one."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, list):
        return [" "] * len(prompt)
    return " " if embeds is None else [" "] * len(embeds)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _switched_on(guider: BaseGuidance) -> float:
    """A scale at which the stock pipeline makes both predictions: the guider's, or 2 if that is less or no number."""
    value = getattr(inner_guider(guider), "guidance_scale", None)
    return max(float(value), 2.0) if _finite(value) else 2.0


def _joined(signature: inspect.Signature, added: inspect.Parameter) -> inspect.Signature:
    """A signature with one more parameter, before ``**kwargs`` if it has them."""
    parameters = list(signature.parameters.values())
    end = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:end], added, *parameters[end:]])
