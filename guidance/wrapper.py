"""Guiders around other guiders: an interval of noise levels, and rescaling."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput  # noqa: F401  loading looks for it here

from .base import COND, Guidance, Scale, check_finite
from .classifier_free import ClassifierFreeGuidance
from .prediction import AffinePrediction

__all__ = ["GuidanceRescale", "IntervalGuidance"]


class _Wrapper(Guidance):
    """Hands everything to an inner guider, which its config holds as a dict."""

    def _wrap(self, guidance_scale: Scale | None, guider: Guidance | Mapping[str, Any] | None) -> Guidance:
        if guider is not None and guidance_scale is not None:
            raise ValueError("give `guider` or `guidance_scale`, the scale of plain guidance, not both")
        if guider is None:
            guider = ClassifierFreeGuidance(7.5 if guidance_scale is None else guidance_scale)
        if isinstance(guider, Mapping):
            guider = _from_dict(guider)
        if not isinstance(guider, Guidance):
            raise TypeError(f"`guider` must be a guider of trimtab.guidance, got {type(guider).__name__}")
        config = {"_class_name": type(guider).__name__}
        config.update({key: value for key, value in guider.config.items() if not key.startswith("_")})
        self.register_to_config(guider=config, guidance_scale=None)
        return guider

    def to_json_string(self) -> str:
        self.guider.to_json_string()  # refuses functions
        return super().to_json_string()

    def new(self, **kwargs: Any) -> "_Wrapper":
        return type(self).from_config(self.config, **kwargs)

    @property
    def needs_sample(self) -> bool:
        return self.guider.needs_sample

    @property
    def needs_pictures(self) -> bool:
        return self.guider.needs_pictures

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor | float | None) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)

    def set_sample(
        self,
        sample: torch.Tensor | None,
        prediction: AffinePrediction | None,
        next_prediction: AffinePrediction | None = None,
    ) -> None:
        super().set_sample(sample, prediction, next_prediction)
        self.guider.set_sample(sample, prediction, next_prediction)

    def expect(self, *told: Any) -> None:
        super().expect(*told)
        self.guider.expect(*told)

    def reset(self) -> None:
        self.guider.reset()

    def release(self) -> None:
        self.guider.release()
        super().release()

    @property
    def guides(self) -> bool:
        return self._enabled and self.guider.guides

    @property
    def is_guided(self) -> bool:
        return self._enabled and self.in_window and self.guider.is_guided

    @property
    def is_conditional(self) -> bool:
        return self.guider.is_conditional

    @property
    def wanted(self) -> list[str]:
        return self.guider.wanted if self.is_guided else [COND]

    @property
    def may_want(self) -> list[str]:
        return self.guider.may_want if self._enabled else [COND]

    @property
    def weak_denoiser(self) -> torch.nn.Module | None:
        return getattr(self.guider, "weak_denoiser", None)

    def install(self, denoiser: torch.nn.Module, rows: Any) -> Callable[[], None]:
        return self.guider.install(denoiser, rows)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self.guider.cleanup_models(denoiser)

    def forward(self, pred_cond: torch.Tensor, **predictions: torch.Tensor | None) -> GuiderOutput:
        if not self.is_guided:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=predictions.get("pred_uncond"))
        return self.finish(self.guider.forward(pred_cond, **predictions))

    def finish(self, output: GuiderOutput) -> GuiderOutput:
        """What the wrapper does to the inner guider's result."""
        return output


def _from_dict(config: Mapping[str, Any]) -> Guidance:
    from . import GUIDERS

    classes = {cls.__name__: cls for cls in GUIDERS.values()}
    name = config.get("_class_name")
    if name not in classes:
        raise ValueError(f"`guider` must name one of {', '.join(sorted(classes))}, got {name!r}")
    return classes[name].from_config({key: value for key, value in config.items() if not key.startswith("_")})


class IntervalGuidance(_Wrapper):
    """Guidance in a limited interval of noise levels (Kynkäänniemi et al., arXiv 2404.07724).

        w at noise level s is w if s_lo < s <= s_hi, else 1, where the unconditional half need not be computed

    Args:
        guidance_scale: w of plain guidance; or give ``guider``.
        guider: the rule inside, or its config.
        sigma_range: (s_lo, s_hi) in the scheduler's sigmas: sigma / alpha for DDIM, DPM-Solver++ and Euler schedulers,
            0 to 1 for flow matching. The paper's for EDM2-XXL is (0.19, 1.61], for SDXL about (0.28, 5.42].
        start, stop: an interval in shares of the steps, see ``Guidance``. Both hold; None for all steps if there is
            a ``sigma_range``, else for those from 20 to 80 %.
        enabled: whether it guides at all.

    Raises:
        ValueError: if numbers are out of range, or both ``guidance_scale`` and ``guider`` are given.
        TypeError: if ``guider`` is no guider.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale | None = None,
        sigma_range: tuple[float, float] | None = None,
        guider: Guidance | Mapping[str, Any] | None = None,
        start: float | None = None,
        stop: float | None = None,
        enabled: bool = True,
    ):
        everything = sigma_range is not None
        start = (0.0 if everything else 0.2) if start is None else start
        stop = (1.0 if everything else 0.8) if stop is None else stop
        self.guider = self._wrap(guidance_scale, guider)  # first: the base's constructor tells it of its state
        super().__init__(1.0, start, stop, enabled)
        if sigma_range is not None:
            if len(sigma_range) != 2:
                raise ValueError(f"`sigma_range` must be two numbers, got {sigma_range!r}")
            low, high = sigma_range
            check_finite("sigma_range", low, low=0.0)
            check_finite("sigma_range", high, low=low)
        self.sigma_range = sigma_range

    @property
    def is_guided(self) -> bool:
        if not super().is_guided:
            return False
        if self.sigma_range is None or self._prediction is None:
            return True  # without a noise level: both predictions may be needed
        low, high = self.sigma_range
        return low < self.sigma <= high

    @property
    def needs_sample(self) -> bool:
        return self.sigma_range is not None or super().needs_sample

    def forward(self, pred_cond: torch.Tensor, **predictions: torch.Tensor | None) -> GuiderOutput:
        if self.sigma_range is not None and self._prediction is None:
            raise RuntimeError("`sigma_range` needs the noise level: use attach(), or call set_sample()")
        return super().forward(pred_cond, **predictions)


class GuidanceRescale(_Wrapper):
    """Rescaled guidance (Lin, Liu, Li, Yang, arXiv 2305.08891, section 3.4) around any rule.

        g' = g std(c) / std(g) for each item;  result = phi g' + (1 - phi) g

    Args:
        guidance_scale: w of plain guidance; or give ``guider``.
        guidance_rescale: phi, in [0, 1]; 0.7 in the paper.
        guider: the rule inside, or its config.
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if numbers are out of range, or both ``guidance_scale`` and ``guider`` are given.
        TypeError: if ``guider`` is no guider.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale | None = None,
        guidance_rescale: float = 0.7,
        guider: Guidance | Mapping[str, Any] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        self.guider = self._wrap(guidance_scale, guider)  # first: the base's constructor tells it of its state
        super().__init__(1.0, start, stop, enabled)
        check_finite("guidance_rescale", guidance_rescale, low=0.0, high=1.0)
        self.guidance_rescale = guidance_rescale

    def finish(self, output: GuiderOutput) -> GuiderOutput:
        wide = torch.promote_types(output.pred.dtype, torch.float32)
        g, c = output.pred.to(wide), output.pred_cond.to(wide)
        dims = tuple(range(1, g.ndim))
        spread = g.std(dims, keepdim=True)
        # Of a constant nothing is to be scaled.
        ratio = torch.where(spread > 0, c.std(dims, keepdim=True) / spread, 1.0)
        output.pred = (g * (1 + self.guidance_rescale * (ratio - 1))).to(output.pred.dtype)
        return output
