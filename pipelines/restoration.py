"""Pictures from uncalibrated measurements: unknown gains by blind calibration, the picture under a frozen flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm

from trimtab.optim.checks import checked_number
from trimtab.optim.solvers import gain_step, project_gains

from .arguments import checked_count, checked_generators
from .edit_methods.velocity import velocity_of
from .families import family_of, size_multiple
from .flowopt_output import as_output_type
from .flowopt_task import conditioned_map, counted
from .sensors import Sensor, least_squares

__all__ = ["RestorationPipeline", "RestorationPipelineOutput", "RestorationState"]

_OUTPUT_TYPES = ("pil", "np", "pt")
_LAST_LEVEL = 0.05
"""Noise of the last step, where the flow hardly changes the picture."""
_ROUNDS = 3
"""Of picture and gains in turn, in each step of the second half, where the picture is worth fitting gains to."""


@dataclass(frozen=True)
class RestorationState:
    """A step's result.

    Attributes:
        step: from 0.
        sigma: level of the noise that the flow took away, in (0, 1].
        images: (1, 3, H, W) float32 on the CPU, the picture after the data step; not cut to [0, 1].
        gains: of the sensor's `gains_shape`, on the CPU.
        residual: root mean square of diag(g) A x - y over what is seen.
    """

    step: int
    sigma: float
    images: Tensor
    gains: Tensor
    residual: float


@dataclass
class RestorationPipelineOutput(BaseOutput):
    """The result of a restoration.

    Attributes:
        images: one picture, as `output_type` says.
        gains: of the sensor's `gains_shape`, averaging 1.
        residuals: (steps,) float32, of each step.
        num_function_evaluations: evaluations of the denoiser, a guided step counting two.
        interrupted: whether the keyboard ended the run.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    gains: Tensor
    residuals: Tensor
    num_function_evaluations: int
    interrupted: bool = False


class RestorationPipeline:
    """Restores a picture from several snapshots through a sensor whose gains nobody knows.

    y_l = diag(g) A_l x + noise, with gains g > 0 of mean 1 that are the same in all snapshots and colours. From a
    high level of noise s to a low one, each step

        x0 <- what the flow makes of (1 - s) x + s noise in its latents, by one evaluation
        g  <- argmin ||diag(g) A x0 - y||^2, of mean 1: the closed form of blind calibration, `gain_step`
        x  <- argmin ||diag(g) A x - y||^2 + (noise_level / s)^2 ||x - x0||^2, by conjugate gradients

    and in the second half of the steps the last two three times in turn, with x in the place of x0. The gains are the
    model of "Through the Haze: a Non-Convex Approach to Blind Gain Calibration for Linear Random Sensing Models"
    (arXiv:1610.09028); the flow stands for the signal's subspace there, so that fewer measurements do than without.
    Data steps and a denoiser's in turn are plug and play: for flows "PnP-Flow" (arXiv:2410.02423), with the data step
    of DiffPIR (arXiv:2305.08995).

    What cannot be told: a gain that multiplies one and the same part of the picture in all snapshots; a common factor
    of picture and gains, which is why gains average 1. The pipeline is left as it was.

    Args:
        pipe: a stock pipeline for pictures with a flow, of a family in the table, or of a subclass of one.

    Attributes:
        pipe: the pipeline.

    Raises:
        ValueError: a pipeline of no known family, one for videos, or one without a flow.

    Example:
        >>> sensor = ShiftedSensor([(0, 0), (9, -14), (-20, 5)], masks)                           # doctest: +SKIP
        >>> restore = RestorationPipeline.from_pipe(stock)                                        # doctest: +SKIP
        >>> restore(snapshots, sensor, "a fox on a mint background").images[0]                    # doctest: +SKIP
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        if family_of(pipe).video:
            raise ValueError(f"`pipe` is a {type(pipe).__name__}, which makes videos; takes one that makes pictures")
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"`pipe` has a {type(pipe.scheduler).__name__}; takes a pipeline with a flow "
                "(FlowMatchEulerDiscreteScheduler)"
            )
        self.pipe = pipe
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline) -> RestorationPipeline:
        """A restoring pipeline around one in memory; as the class itself, in the words of Diffusers."""
        return cls(pipeline)

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> RestorationPipeline:
        """A restoring pipeline of a repository or folder of a stock pipeline; `kwargs` as for Diffusers."""
        return cls(DiffusionPipeline.from_pretrained(model, **kwargs))

    def to(self, *args: Any, **kwargs: Any) -> RestorationPipeline:
        """Moves the pipeline, as in Diffusers."""
        self.pipe.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Settings of tqdm's bar, as in Diffusers."""
        self._progress = kwargs

    @torch.no_grad()
    def __call__(
        self,
        measurements: Any,
        sensor: Sensor,
        prompt: str | None = "",
        *,
        noise_level: float = 0.02,
        gains: Tensor | None = None,
        rho: float = 0.99,
        strength: float = 0.8,
        num_inference_steps: int = 12,
        guidance_scale: float = 3.0,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        callback_on_iteration_end: Callable[[Any, int, RestorationState], bool | None] | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        **pipeline_kwargs: Any,
    ) -> RestorationPipelineOutput | tuple[Any, ...]:
        """Restores one picture.

        Args:
            measurements: y of the sensor's `measurement_shape`, a tensor or an array, a picture's white being 1; what
                isn't seen is 0. Or, of a sensor on a grid, a list of PIL images, one a snapshot.
            sensor: A, such as a `ShiftedSensor` or a `PatternedSensor`.
            prompt: what the picture shows; the more it says, the less the data have to.
            noise_level: deviation of the measurements' noise, >= 0: how far the data are believed.
            gains: known gains of the sensor's `gains_shape`; None finds them.
            rho: in (0, 1], how far gains may be from 1.
            strength: the first level of noise, in (0, 1): how much the flow may invent.
            num_inference_steps: steps, >= 1; levels fall evenly to 0.05.
            guidance_scale: of the prompt, in the usual convention where 1 is none.
            negative_prompt: what to guide away from.
            generator: of the flow's noise; None is seed 0.
            callback_on_iteration_end: called as (pipeline, step, state) after each step; True ends the run there.
            output_type: "pil", "np" or "pt".
            return_dict: whether to return a `RestorationPipelineOutput`; a tuple otherwise.
            pipeline_kwargs: arguments of the stock call, such as `max_sequence_length`.

        Returns:
            A `RestorationPipelineOutput`. An interrupt from the keyboard ends the run with the last picture.

        Raises:
            ValueError: an argument out of range, measurements of another shape or not finite or all 0, a sensor whose
                gains no data can tell or whose pictures the model doesn't make.
            TypeError: an argument of the wrong type, or one that the stock call doesn't have.
        """
        if not isinstance(sensor, Sensor):
            raise TypeError(f"`sensor` is a {type(sensor).__name__}; takes a Sensor, such as ShiftedSensor")
        checked_count("num_inference_steps", num_inference_steps)
        checked_number("noise_level", noise_level, least=0)
        if not 0 < checked_number("strength", strength) < 1:
            raise ValueError(f"`strength` is {strength}; takes a number in (0, 1)")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; takes one of {', '.join(_OUTPUT_TYPES)}")
        if not (prompt is None or isinstance(prompt, str)):
            raise TypeError(f"`prompt` is a {type(prompt).__name__}; takes a string: one picture is restored a call")
        y, known = _checked_data(measurements, sensor, gains, rho)
        _, height, width = sensor.image_shape
        multiple = size_multiple(self.pipe)
        if height % multiple or width % multiple:
            raise ValueError(f"`sensor` sees {height} x {width} pixels; takes multiples of {multiple} for this model")
        generator = checked_generators(torch.Generator().manual_seed(0) if generator is None else generator, 1)
        flow = conditioned_map(
            self.pipe, prompt, guidance_scale, negative_prompt, height=height, width=width, **pipeline_kwargs
        )
        flow.offload_after_call = False
        device, calls = self.pipe._execution_device, {"rows": 0}
        task = _Data(sensor.to(device), y.to(device), noise_level, rho, None if known is None else known.to(device))
        states: list[RestorationState] = []
        interrupted = False
        levels = torch.linspace(strength, min(_LAST_LEVEL, strength), num_inference_steps).tolist()
        try:
            with counted(self.pipe, calls), tqdm(total=len(levels), **self._progress) as progress:
                for state in _steps(task, flow, levels, generator):
                    states.append(state)
                    progress.set_postfix_str(f"residual {state.residual:.3g}")
                    progress.update()
                    if callback_on_iteration_end is not None and callback_on_iteration_end(self, state.step, state):
                        break
        except KeyboardInterrupt:
            if not states:
                raise
            interrupted = True
        finally:
            self.pipe.maybe_free_model_hooks()
        images = as_output_type(states[-1].images.clamp(0, 1), output_type)
        residuals = torch.tensor([state.residual for state in states])
        output = RestorationPipelineOutput(images, states[-1].gains, residuals, calls["rows"], interrupted)
        return output if return_dict else output.to_tuple()


@dataclass
class _Data:
    """The measurements and what is known of the gains."""

    sensor: Sensor
    y: Tensor
    noise_level: float
    rho: float
    known: Tensor | None

    def gains_for(self, image: Tensor) -> Tensor:
        """The best gains, snapshots and colours being snapshots alike."""
        if self.known is not None:
            return self.known
        rows = len(self.y) * 3
        found = gain_step(self.y.reshape(rows, -1), self.sensor.forward(image).reshape(rows, -1), rho=self.rho)
        return found.reshape(self.sensor.gains_shape)

    def residual(self, image: Tensor, gains: Tensor) -> float:
        seen = self.sensor.sees().to(self.y)
        return float(((gains * self.sensor.forward(image) - self.y) * seen).norm() / seen.sum().sqrt())


def _steps(task: _Data, flow: Any, levels: Sequence[float], generator: Any) -> Any:
    """One state a level."""
    velocity = velocity_of(flow)
    x = least_squares(task.y, task.sensor, task.known)
    for step, level in enumerate(levels):
        sigma = torch.tensor(level, device=x.device)
        latents = flow.encode(x[None].clamp(0, 1)).float()
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        z = (1 - sigma) * latents + sigma * noise
        clean = flow.decode(z - sigma * velocity(z, sigma))[0].float()
        gains = task.gains_for(clean)
        weight = max((task.noise_level / max(level, _LAST_LEVEL)) ** 2, 1e-6)
        for _ in range(_ROUNDS if 2 * step >= len(levels) and task.known is None else 0):
            x = least_squares(task.y, task.sensor, gains, prior=clean, weight=weight, max_iterations=20)
            gains = task.gains_for(x)
        x = least_squares(task.y, task.sensor, gains, prior=clean, weight=weight)
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(f"the picture is not finite at step {step}")
        yield RestorationState(step, level, x[None].cpu(), gains.cpu(), task.residual(x, gains))


def _checked_data(measurements: Any, sensor: Sensor, gains: Any, rho: float) -> tuple[Tensor, Tensor | None]:
    project_gains(torch.ones(2), rho)
    if isinstance(measurements, (list, tuple)) and measurements and isinstance(measurements[0], PIL.Image.Image):
        arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in measurements]
        if len({array.shape for array in arrays}) > 1:
            raise ValueError("`measurements` has pictures of different sizes; takes snapshots of one size")
        measurements = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)
    try:
        y = torch.as_tensor(measurements).float()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"`measurements` is a {type(measurements).__name__}; takes a tensor or pictures") from None
    if tuple(y.shape) != tuple(sensor.measurement_shape):
        raise ValueError(f"`measurements` has shape {tuple(y.shape)}; takes {tuple(sensor.measurement_shape)}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("`measurements` has values that are not finite")
    if not bool(y.any()):
        raise ValueError("`measurements` is 0 everywhere: there is nothing to restore from")
    if gains is None:
        if not sensor.identifies_gains:
            raise ValueError(
                "`sensor` shows each gain the same part of the picture in all snapshots, so no data can tell the "
                "gains; takes different shifts or patterns, or pass `gains`"
            )
        return y, None
    gains = torch.as_tensor(gains).float()
    if tuple(gains.shape) != tuple(sensor.gains_shape):
        raise ValueError(f"`gains` has shape {tuple(gains.shape)}; takes {tuple(sensor.gains_shape)}")
    if not bool((gains > 0).all()) or not bool(torch.isfinite(gains).all()):
        raise ValueError("`gains` has values that are not finite and > 0")
    return y, gains
