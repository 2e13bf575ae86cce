"""What a denoiser predicts, as denoised data: output <-> x0 for every parametrisation and scheduler.

A noisy latent is ``x = alpha * x0 + sigma * n``. Whatever the network predicts, its output is an affine
function of ``x0`` given ``x``, so two numbers describe the conversion at one noise level:

    x0 = skip * x + out * output            output = (x0 - skip * x) / out

========================  =========================  ====================================
prediction_type           skip                       out
========================  =========================  ====================================
``epsilon``               1 / alpha                  -sigma / alpha
``v_prediction``          alpha / (alpha^2+sigma^2)  -sigma / sqrt(alpha^2 + sigma^2)
``flow_prediction``       1 / (alpha + sigma)        -sigma / (alpha + sigma)
``sample``                0                          1
``edm``                   c_skip                     c_out  (Karras et al., arXiv 2206.00364, table 1)
``edm_v_prediction``      c_skip                     -c_out
========================  =========================  ====================================

The rows hold in every convention that schedulers use for ``x``: variance preserving (DDIM, DPM-Solver++,
UniPC; alpha^2 + sigma^2 = 1), variance exploding (Euler, Heun; alpha = 1) and flow matching (alpha = 1 -
sigma).
"""

import math
from dataclasses import dataclass

import torch

__all__ = ["PREDICTION_TYPES", "AffinePrediction", "NoiseSchedule", "from_x0", "to_x0"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction", "sample", "edm", "edm_v_prediction")


@dataclass(frozen=True)
class AffinePrediction:
    """The conversion at one noise level, ``x0 = skip * x + out * output``; see the module's table.

    Attributes:
        skip: factor of the noisy latent.
        out: factor of the network's output; 0 where there is no noise left, and then no inverse exists.
        alpha: the data's factor in ``x = alpha * x0 + sigma * n``.
        sigma: the noise's factor in it.
        flow: whether sigma is the time of a flow from noise at 1 to data at 0.
    """

    skip: float
    out: float
    alpha: float
    sigma: float
    flow: bool = False

    @classmethod
    def of(cls, prediction_type: str, alpha: float, sigma: float, *, sigma_data: float = 0.5) -> "AffinePrediction":
        """The conversion of a prediction type at ``x = alpha * x0 + sigma * n``.

        Args:
            prediction_type: one of ``PREDICTION_TYPES``.
            alpha: the data's factor, > 0 for epsilon.
            sigma: the noise's factor, >= 0.
            sigma_data: the data's standard deviation in EDM's preconditioning; unused by the other types.

        Raises:
            ValueError: for an unknown ``prediction_type``.
        """
        if prediction_type == "epsilon":
            # alpha is 0 at the first step of a zero-terminal-SNR schedule: nothing of x0 is left to read off
            skip, out = (1 / alpha, -sigma / alpha) if alpha else (math.inf, -math.inf)
        elif prediction_type == "v_prediction":
            power = alpha**2 + sigma**2
            skip, out = alpha / power, -sigma / math.sqrt(power)
        elif prediction_type == "flow_prediction":
            skip, out = 1 / (alpha + sigma), -sigma / (alpha + sigma)
        elif prediction_type == "sample":
            skip, out = 0.0, 1.0
        elif prediction_type in ("edm", "edm_v_prediction"):
            power = sigma**2 + sigma_data**2
            skip, out = sigma_data**2 / power, sigma * sigma_data / math.sqrt(power)
            out = -out if prediction_type == "edm_v_prediction" else out
        else:
            raise ValueError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        return cls(skip, out, alpha, sigma, prediction_type == "flow_prediction")

    @property
    def noise_to_signal(self) -> float:
        """sigma / alpha, the noise level of EDM and of variance exploding schedules; inf for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def level(self) -> float:
        """The noise level as users of the scheduler know it: its time for flows, else sigma / alpha."""
        return self.sigma if self.flow else self.noise_to_signal

    @property
    def invertible(self) -> bool:
        """Whether an output follows from x0: false without noise, and where epsilon says nothing of x0."""
        return self.out != 0 and math.isfinite(self.out)


def to_x0(output: torch.Tensor, x: torch.Tensor, prediction: AffinePrediction) -> torch.Tensor:
    """The denoised data that a network's output stands for.

    Args:
        output: the network's output, any shape and floating dtype, as the scheduler's ``step`` takes it.
        x: the noisy latent, same shape: the ``sample`` that the scheduler's ``step`` takes, not scaled for
            the network.
        prediction: the conversion at this noise level.

    Returns:
        x0, same shape, computed and returned in at least float32.
    """
    return prediction.skip * _wide(x) + prediction.out * _wide(output)


def from_x0(x0: torch.Tensor, x: torch.Tensor, prediction: AffinePrediction) -> torch.Tensor:
    """The network's output that stands for a denoised prediction: the inverse of ``to_x0``.

    Raises:
        ValueError: where the output does not follow from x0 (no noise left).
    """
    if not prediction.invertible:
        raise ValueError(f"no output follows from x0 at sigma={prediction.sigma:g}, alpha={prediction.alpha:g}")
    return (_wide(x0) - prediction.skip * _wide(x)) / prediction.out


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: half precision loses x0 as a difference of large numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class NoiseSchedule:
    """The conversions of all steps of a Diffusers scheduler, as plain numbers on the host.

    Built once after ``set_timesteps``, so that no step waits for the device.

    Args:
        scheduler: a Diffusers scheduler on which ``set_timesteps`` was called.

    Attributes:
        predictions: one ``AffinePrediction`` for each of the scheduler's timesteps, then the end of the last
            step.
        timesteps: the scheduler's timesteps as floats.

    Raises:
        NotImplementedError: for a scheduler whose latents' noise level isn't known here.
        ValueError: for an unknown prediction type.
    """

    def __init__(self, scheduler: object):
        self.timesteps: list[float] = [float(t) for t in _host(scheduler.timesteps)]
        self._kind, levels = _levels(scheduler, len(self.timesteps))
        sigma_data = float(getattr(scheduler.config, "sigma_data", 0.5))
        self.predictions = [
            AffinePrediction.of(self._kind, alpha, sigma, sigma_data=sigma_data) for alpha, sigma in levels
        ]

    def __getitem__(self, index: int) -> AffinePrediction:
        return self.predictions[index]

    def __len__(self) -> int:
        return len(self.timesteps)

    def index_of(self, timestep: float | torch.Tensor) -> int:
        """The first step at this timestep. Reads a tensor's value: on a GPU this waits for it."""
        return min(range(len(self)), key=lambda i: abs(self.timesteps[i] - float(timestep)))


def _host(values: object) -> list[float]:
    return torch.as_tensor(values, device="cpu").double().tolist()


def _levels(scheduler: object, steps: int) -> tuple[str, list[tuple[float, float]]]:
    """(prediction type, [(alpha, sigma) at each step and at the end]) of the latents that ``step`` takes."""
    config = scheduler.config
    kind = getattr(config, "prediction_type", None)
    name = type(scheduler).__name__
    if name.startswith("DPMSolverSDE"):  # evaluates at a midpoint that it does not keep
        raise NotImplementedError(f"the noise level of {name}'s second evaluations is not known outside of it")
    sigmas = _host(scheduler.sigmas) if hasattr(scheduler, "sigmas") else None
    if sigmas is not None and getattr(scheduler, "sigmas_interpol", None) is not None:
        # KDPM2's second evaluations lie between two of its sigmas
        between = _host(scheduler.sigmas_interpol)
        sigmas = [between[i] if i % 2 and i < steps else s for i, s in enumerate(sigmas)]

    if hasattr(scheduler, "precondition_outputs"):  # EDM schedulers: x = x0 + sigma n
        kinds = {"epsilon": "edm", "v_prediction": "edm_v_prediction"}
        if kind not in kinds:
            raise ValueError(f"`prediction_type` of {name} must be epsilon or v_prediction, got {kind!r}")
        return kinds[kind], [(1.0, s) for s in sigmas]
    flow = "flow_prediction"
    if sigmas is not None and (hasattr(scheduler, "scale_noise") or getattr(config, "use_flow_sigmas", False)):
        return kind or flow, [(1 - s, s) for s in sigmas]  # x = (1 - s) x0 + s n
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver, UniPC, DEIS: s is sigma / alpha
        return kind, [(1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)) for s in sigmas]
    if sigmas is not None and hasattr(scheduler, "alphas_cumprod"):  # Euler, Heun, LMS: x = x0 + s n
        return kind, [(1.0, s) for s in sigmas]
    if hasattr(scheduler, "alphas_cumprod") and kind is not None:  # DDIM, DDPM, PNDM, LCM, TCD
        kept = _host(scheduler.alphas_cumprod)
        last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        products = [kept[int(t)] for t in _host(scheduler.timesteps)] + [last]
        return kind, [(math.sqrt(a), math.sqrt(1 - a)) for a in products]
    raise NotImplementedError(f"the noise level of the latents of {name} is not known")
