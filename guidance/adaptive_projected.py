"""Adaptive projected guidance (Sadat, Hilliges, Weber, arXiv 2410.02416)."""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  loading looks for it here

from .base import Guidance, Scale, check_finite
from .tuned_preset import TunedPreset

__all__ = ["PRESETS", "RESCALE_RMS", "AdaptiveProjectedGuidance", "adaptive_projected_guidance", "project"]

PRESETS: dict[str, dict[str, float | None]] = {
    # r and momentum of SDXL and r of EDM2 are the paper's; the other numbers are starting points
    "sdxl": {"guidance_scale": 15.0, "rescale": 15.0, "momentum": -0.5},
    "sd2.1": {"guidance_scale": 10.0, "rescale": 7.5, "momentum": -0.75},
    "sd1.5": {"guidance_scale": 10.0, "rescale": 7.5, "momentum": -0.75},
    "sd3": {"guidance_scale": 10.0, "rescale": 15.0, "momentum": -0.5},
    "dit-xl-2": {"guidance_scale": 4.0, "rescale": 5.0, "momentum": -0.5},
    "edm2-s": {"guidance_scale": 4.0, "rescale": 2.5, "momentum": -0.75},
    "edm2-xxl": {"guidance_scale": 2.0, "rescale": 2.5, "momentum": -0.75},
    "emoji-scenes": {"guidance_scale": 10.0, "rescale_rms": 0.015, "momentum": -0.5},  # found by trimtab bench guidance
}
"""Settings by model: w, r (or its root mean square) and beta; eta is 0 in all."""

RESCALE_RMS = 0.0586
"""SDXL's r = 15 for latents of any size: its root mean square over 4 x 128 x 128 elements."""

_DEFAULT_RESCALE = float("15")  # an object of its own: tells "left at its default" from "15.0 was given"


def project(v: torch.Tensor, ref: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits each item of a batch into the parts parallel and orthogonal to a reference.

        v_par = <v, ref> / <ref, ref> * ref        v_perp = v - v_par

    Args:
        v: (B, ...), any floating dtype.
        ref: same shape.

    Returns:
        ``(parallel, orthogonal)``, shape and dtype of ``v``, computed in float64 (float32 on MPS). A zero
        reference has no direction: nothing is parallel to it.

    Raises:
        ValueError: if the shapes differ or there is no dimension besides the batch.

    Example:
        >>> v, ref = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
        >>> [part.tolist() for part in project(v, ref)]
        [[[3.0, 0.0]], [[0.0, 4.0]]]
    """
    _check_pair("v", v, "ref", ref)
    wide = torch.float32 if v.device.type == "mps" else torch.float64
    a, b = v.flatten(1).to(wide), ref.flatten(1).to(wide)
    square = (b * b).sum(1, keepdim=True)
    share = (a * b).sum(1, keepdim=True) / torch.where(square > 0, square, 1.0)
    parallel = share * b
    return parallel.to(v.dtype).view_as(v), (a - parallel).to(v.dtype).view_as(v)


def adaptive_projected_guidance(
    x0_cond: torch.Tensor,
    x0_uncond: torch.Tensor,
    guidance_scale: float,
    *,
    eta: float = 0.0,
    rescale: float | None = 15.0,
    momentum: float | None = -0.5,
    buffer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of APG on denoised predictions (algorithm 1 of arXiv 2410.02416).

        d     = (D_c - D_u) + beta * d_prev                        momentum
        d_r   = d * min(1, r / ||d||)                              rescaling
        D_APG = D_c + (w - 1) * (d_perp + eta * d_par)          d_par along D_c, d_perp orthogonal

    Args:
        x0_cond: D_c, (B, ...), any floating dtype. Norms and products run over all dimensions but the first.
        x0_uncond: D_u, same shape.
        guidance_scale: w; 1 returns D_c.
        eta: weight of the parallel part; 0 is the paper's advice, 1 without the other two is plain guidance.
        rescale: r, the greatest norm of the update; None or <= 0 for none. It grows as the root of the
            latent's size.
        momentum: beta, in (-1, 1), negative in the paper; None or 0 for none.
        buffer: d_prev, what the step before returned; None at the first step.

    Returns:
        ``(D_APG, d)``: the guided prediction in the dtype of ``x0_cond``, and the buffer for the next step,
        in at least float32. The buffer is d before rescaling.

    Raises:
        ValueError: if the shapes differ or |momentum| >= 1.

    Example:
        >>> c, u = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -1.0]])
        >>> adaptive_projected_guidance(c, u, 3.0, rescale=None, momentum=None)[0].tolist()   # c + 2 * (0, 1)
        [[1.0, 2.0]]
    """
    _check_pair("x0_cond", x0_cond, "x0_uncond", x0_uncond)
    _check_momentum(momentum)
    wide = torch.promote_types(x0_cond.dtype, torch.float32)
    c = x0_cond.to(wide)
    d = c - x0_uncond.to(wide)
    if momentum and buffer is not None:
        d = d + momentum * buffer
    update_d, update_c = _update_weights(d, c, eta=eta, rescale=rescale)
    w = guidance_scale - 1
    return ((1 + w * update_c) * c + w * update_d * d).to(x0_cond.dtype), d


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> of each row of two (B, N) tensors, (B,)."""
    if a.device.type == "cpu":
        return torch.bmm(a[:, None], b[:, :, None]).view(-1)  # BLAS, in one pass
    # a matrix product of two rows with a million columns is the slowest thing to ask of a GPU
    return torch.linalg.vecdot(a, b)


def _update_weights(
    d: torch.Tensor, c: torch.Tensor, *, eta: float, rescale: float | None
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The update as ``a * d + b * c``: a, b of shape (B, 1, ..., 1) in d's dtype, from float64 products.

    Half precision overflows in the squares of a large latent, and float32 loses the small parallel part.
    """
    bounded = rescale is not None and rescale > 0
    if not bounded and eta == 1:
        return 1.0, 0.0
    wide = torch.float32 if d.device.type == "mps" else torch.float64
    flat_d, flat_c = d.flatten(1).to(wide), c.flatten(1).to(wide)
    dc, cc = dot(flat_d, flat_c), dot(flat_c, flat_c)
    # r / max(||d||, r), written so that its gradient is finite at d = 0
    a = rescale * dot(flat_d, flat_d).clamp_min(rescale**2).rsqrt() if bounded else torch.ones_like(dc)
    b = (eta - 1) * a * dc / torch.where(cc > 0, cc, 1.0)
    shape = (-1,) + (1,) * (d.ndim - 1)
    return a.to(d.dtype).view(shape), b.to(d.dtype).view(shape)


class AdaptiveProjectedGuidance(Guidance):
    """Adaptive projected guidance as a Diffusers guider (arXiv 2410.02416, algorithm 1).

        d = (D_c - D_u) + beta * d_prev
        d = d * min(1, r / ||d||)
        D = D_c + (w - 1) * (d_perp + eta * d_par)

    It differs from ``diffusers.AdaptiveProjectedGuidance`` in three points: predictions are turned into
    denoised ones first, as the authors do (``space="raw"`` leaves them as they are); the sum starts at the
    conditional prediction, so ``guidance_scale`` is the paper's w; and the defaults are the paper's, not
    plain guidance.

    Args:
        guidance_scale: w, or a callable w(sigma).
        adaptive_projected_guidance_momentum: beta, in (-1, 1); None or 0 for none.
        adaptive_projected_guidance_rescale: r, the greatest L2 norm of the update over a whole latent; <= 0
            or None for none.
        adaptive_projected_guidance_rescale_rms: r as a root mean square, r / sqrt(elements): the same
            strength at every size. SDXL's r = 15 at 1024x1024 is 0.0586. Give one of the two.
        eta: weight of the parallel part.
        space: ``"x0"``, or ``"raw"`` for the network's own output (epsilon, v or velocity).
        start, stop, enabled: see ``Guidance``.

    Raises:
        ValueError: if a number is out of range, or both thresholds are given.

    Example:
        >>> guider = AdaptiveProjectedGuidance(guidance_scale=10.0)
        >>> guider.config.adaptive_projected_guidance_momentum, guider.config.eta
        (-0.5, 0.0)
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: Scale = 7.5,
        adaptive_projected_guidance_momentum: float | None = -0.5,
        adaptive_projected_guidance_rescale: float | None = _DEFAULT_RESCALE,
        adaptive_projected_guidance_rescale_rms: float | None = None,
        eta: float = 0.0,
        space: str = "x0",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, start, stop, enabled)
        _check_momentum(adaptive_projected_guidance_momentum)
        check_finite("eta", eta)
        if space not in ("x0", "raw"):
            raise ValueError(f"`space` must be 'x0' or 'raw', got {space!r}")
        rescale, rms = adaptive_projected_guidance_rescale, adaptive_projected_guidance_rescale_rms
        if rms is not None and rescale is _DEFAULT_RESCALE:
            rescale = None
            self.register_to_config(adaptive_projected_guidance_rescale=None)
        if rescale is not None and rms is not None:
            raise ValueError(
                "give `adaptive_projected_guidance_rescale` or `adaptive_projected_guidance_rescale_rms`, "
                f"not both; got {rescale} and {rms}"
            )
        for name, value in (("rescale", rescale), ("rescale_rms", rms)):
            if value is not None:
                check_finite(f"adaptive_projected_guidance_{name}", value)
        self.momentum, self.rescale, self.rescale_rms = adaptive_projected_guidance_momentum, rescale, rms
        self.eta, self.space = eta, space
        self.needs_sample = space == "x0"
        self.reset()

    @classmethod
    def from_preset(cls, name: str, **overrides: object) -> "AdaptiveProjectedGuidance":
        """The settings for a model by name, see ``PRESETS``, or of a file that ``trimtab tune`` wrote.

        Args:
            name: a key of ``PRESETS``, or a path that ends in .json.
            overrides: arguments of the class that replace the preset's.

        Raises:
            ValueError: for an unknown name, or a file that is no preset.
            FileNotFoundError: if there is no such file.

        Example:
            >>> AdaptiveProjectedGuidance.from_preset("sdxl", guidance_scale=8.0).guidance_scale
            8.0
        """
        prefix = "adaptive_projected_guidance_"
        if str(name).endswith(".json"):
            settings = TunedPreset.load(name).guidance_arguments()
        elif name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(sorted(PRESETS))} or a .json file, got {name!r}")
        else:
            settings = {key if key == "guidance_scale" else prefix + key: v for key, v in PRESETS[name].items()}
        thresholds = {prefix + "rescale", prefix + "rescale_rms"}
        if thresholds & set(overrides):
            settings = {key: value for key, value in settings.items() if key not in thresholds}
        return cls(**{**settings, **overrides})

    def reset(self) -> None:
        """Empties the momentum buffer."""
        self._previous: torch.Tensor | None = None  # d of the last guided step
        self._current: torch.Tensor | None = None  # d of this step's first evaluation
        self._last_level = math.inf

    def next_step(self) -> None:
        if self._current is not None:
            self._previous, self._current = self._current, None

    def combine(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor) -> torch.Tensor:
        """The guided prediction in the network's own parametrisation, shape and dtype of ``pred_cond``.

        With x0 = skip x + out c, the update of x0 is divided by ``out`` and added to c. Converting the guided
        x0 as a whole would be the same but for cancellation at low noise.
        """
        wide = torch.promote_types(pred_cond.dtype, torch.float32)
        c, difference = pred_cond.to(wide), pred_cond.to(wide) - pred_uncond.to(wide)
        out, reference = 1.0, c
        if self.space == "x0":
            if self._prediction is None:
                raise RuntimeError(
                    "guidance in x0 space needs the noisy latent: use attach(), call set_sample(), or set space='raw'"
                )
            if not self._prediction.invertible:
                return pred_cond  # without noise both predictions are x itself
            out = self._prediction.out
            reference = torch.add(self._prediction.skip * self._sample.to(wide), c, alpha=out)
            difference = out * difference
        d = self._with_momentum(difference)
        rescale = self.rescale if self.rescale_rms is None else self.rescale_rms * math.sqrt(d[0].numel())
        a, b = _update_weights(d, reference, eta=self.eta, rescale=rescale)
        w = (self.scale - 1) / out
        if not isinstance(a, torch.Tensor):
            return (c + w * d).to(pred_cond.dtype)  # eta = 1 and no threshold: a = 1, b = 0
        return torch.addcmul(torch.addcmul(c, w * a, d), w * b, reference).to(pred_cond.dtype)

    def _with_momentum(self, difference: torch.Tensor) -> torch.Tensor:
        """d of this evaluation. The buffer moves once a step: solvers that evaluate twice use one d_prev."""
        if not self.momentum:
            return difference
        level = self._prediction.noise_to_signal if self._prediction is not None else self._last_level
        previous = self._previous
        if previous is not None and (
            level > self._last_level or previous.shape != difference.shape or previous.device != difference.device
        ):
            previous = self._previous = None  # another run's
        d = difference if previous is None else torch.add(difference, previous, alpha=self.momentum)
        if self._current is None:
            self._current, self._last_level = d, level
        return d


def _check_momentum(momentum: float | None) -> None:
    if momentum is not None:
        check_finite("momentum", momentum)
        if abs(momentum) >= 1:
            raise ValueError(f"`momentum` must lie strictly between -1 and 1, got {momentum}")


def _check_pair(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.shape != other.shape or tensor.ndim < 2:
        raise ValueError(
            f"`{name}` and `{other_name}` must have one shape (B, ...), got {tuple(tensor.shape)} and "
            f"{tuple(other.shape)}"
        )
