"""Sensors with unknown gains: what they see of a picture in several snapshots, and the adjoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.solvers import conjugate_directions

from .arguments import checked_count

__all__ = ["PatternedSensor", "Sensor", "ShiftedSensor", "least_squares"]


class Sensor:
    """A linear map A of pictures to snapshots, each number of which its sensor multiplies by a gain of its own.

        y_l = diag(g) A_l x,    l = 1..p

    with the same m gains g in all snapshots and colours. A subclass has `forward`, `adjoint` and the attributes.

    Attributes:
        image_shape: (3, H, W).
        measurement_shape: (p, 3, m), or (p, 3, h, w) where the sensors lie on a grid: of what `forward` gives.
    """

    image_shape: tuple[int, int, int]
    measurement_shape: tuple[int, ...]

    def forward(self, image: Tensor) -> Tensor:
        """A x of (3, H, W), without gains."""
        raise NotImplementedError

    def adjoint(self, measurements: Tensor) -> Tensor:
        """A^T y of `measurement_shape`, a picture's shape."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Sensor:
        """The sensor on another device."""
        raise NotImplementedError

    @property
    def gains_shape(self) -> tuple[int, ...]:
        """Of the gains: (m,) or (h, w)."""
        return self.measurement_shape[2:]

    @property
    def identifies_gains(self) -> bool:
        """Whether a gain multiplies different parts of the picture in different snapshots, so that data tell it."""
        return self.measurement_shape[0] > 1

    def measure(
        self, image: Tensor, gains: Tensor | None = None, *, noise_level: float = 0.0, generator: Any = None
    ) -> Tensor:
        """Simulated measurements of a picture.

        Args:
            image: (3, H, W) in [0, 1].
            gains: of `gains_shape`; None is 1 everywhere.
            noise_level: deviation of normal noise, where a sensor sees anything.
            generator: of the noise; None is seed 0.

        Returns:
            Of `measurement_shape`.
        """
        if tuple(image.shape) != self.image_shape:
            raise ValueError(f"`image` has shape {tuple(image.shape)}; takes {self.image_shape}")
        y = self.forward(image)
        if gains is not None:
            y = gains.to(y) * y
        if noise_level:
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            noise = torch.randn(y.shape, generator=generator, device=generator.device).to(y)
            y = y + noise_level * noise * self.sees()
        return y

    def sees(self) -> Tensor:
        """1 where a measurement depends on the picture, else 0; of `measurement_shape`."""
        return torch.ones(self.measurement_shape)


class ShiftedSensor(Sensor):
    """A camera that is moved between snapshots: pixel (i, j) sees x at (i - a, j - b), under a mask.

    Its unevenness stays where it is while the picture moves over it, which is what tells the two apart. In a sensor
    that never moves, each gain multiplies one pixel only: the data say nothing about it.

    Args:
        shifts: (a, b) of each snapshot in whole pixels, down and to the right; what is moved in at an edge is not
            seen.
        masks: (p, H, W), 0 where a pixel of a snapshot is lost, else 1; or (H, W) for all.

    Raises:
        ValueError: shapes that do not fit, values other than 0 and 1, or masks that leave nothing to see.

    Example:
        >>> sensor = ShiftedSensor([(0, 0), (0, 1)], torch.ones(2, 4, 4))
        >>> sensor.forward(torch.ones(3, 4, 4))[1, 0, 0].tolist()
        [0.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, shifts: Sequence[tuple[int, int]], masks: Tensor) -> None:
        self.shifts = [(int(a), int(b)) for a, b in shifts]
        if not self.shifts:
            raise ValueError("`shifts` is empty; takes one pair a snapshot")
        if not isinstance(masks, Tensor) or masks.ndim not in (2, 3) or masks.ndim == 3 and len(masks) != len(shifts):
            got = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise ValueError(f"`masks` is {got} for {len(self.shifts)} shifts; takes ({len(self.shifts)}, H, W)")
        masks = masks.expand(len(self.shifts), *masks.shape[-2:]).float().clone()
        if not bool(((masks == 0) | (masks == 1)).all()):
            raise ValueError("`masks` has values other than 0 and 1")
        height, width = masks.shape[1:]
        for mask, (a, b) in zip(masks, self.shifts, strict=True):
            mask[: max(a, 0)], mask[:, : max(b, 0)] = 0, 0
            mask[max(height + a, 0) if a < 0 else height :] = 0
            mask[:, max(width + b, 0) if b < 0 else width :] = 0
        empty = [index for index, mask in enumerate(masks) if not bool(mask.any())]
        if empty:
            raise ValueError(f"`masks` with `shifts` leaves nothing to see in snapshots {empty}")
        self.masks = masks
        self.image_shape = (3, height, width)
        self.measurement_shape = (len(self.shifts), 3, height, width)

    @property
    def identifies_gains(self) -> bool:
        return len(set(self.shifts)) > 1

    def forward(self, image: Tensor) -> Tensor:
        shifted = [torch.roll(image, shift, (-2, -1)) for shift in self.shifts]
        return torch.stack(shifted) * self.masks[:, None]

    def adjoint(self, measurements: Tensor) -> Tensor:
        seen = measurements * self.masks[:, None]
        return sum(torch.roll(y, (-a, -b), (-2, -1)) for y, (a, b) in zip(seen, self.shifts, strict=True))

    def to(self, device: torch.device | str) -> ShiftedSensor:
        return ShiftedSensor(self.shifts, self.masks.to(device))

    def sees(self) -> Tensor:
        return self.masks[:, None].expand(self.measurement_shape)


class PatternedSensor(Sensor):
    """Detectors that each see the whole picture through a random pattern, another one in each snapshot.

    The patterns of a snapshot are rows of an orthogonal matrix: random signs on the pixels, then a convolution with
    random phases, of which m entries are kept (J. Romberg, "Compressive Sensing by Random Convolution", 2009). That
    is the sensing that blind calibration's guarantees are about (arXiv:1610.09028), at the cost of two FFTs.

    Args:
        height: of the picture in pixels.
        width: of the picture in pixels.
        num_sensors: m, at most height x width.
        num_snapshots: p.
        seed: of the patterns.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, height: int, width: int, num_sensors: int, num_snapshots: int, *, seed: int = 0) -> None:
        height, width = checked_count("height", height), checked_count("width", width)
        m, p = checked_count("num_sensors", num_sensors), checked_count("num_snapshots", num_snapshots)
        if m > height * width:
            raise ValueError(f"`num_sensors` is {m}; takes at most the pixels, {height * width}")
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(2, (p, 1, height, width), generator=generator).float() * 2 - 1
        # The spectrum of white noise, brought to modulus 1: that of a real orthogonal convolution.
        spectrum = torch.fft.rfft2(torch.randn(p, 1, height, width, generator=generator))
        self.phases = spectrum / spectrum.abs().clamp_min(1e-12)
        self.places = torch.randperm(height * width, generator=generator)[:m]
        self.image_shape = (3, height, width)
        self.measurement_shape = (p, 3, m)

    def forward(self, image: Tensor) -> Tensor:
        mixed = torch.fft.irfft2(torch.fft.rfft2(self.signs * image) * self.phases, s=self.image_shape[1:])
        return mixed.flatten(-2)[..., self.places]

    def adjoint(self, measurements: Tensor) -> Tensor:
        p, _, m = self.measurement_shape
        full = measurements.new_zeros(p, 3, math.prod(self.image_shape[1:]))
        full[..., self.places] = measurements
        spectrum = torch.fft.rfft2(full.reshape(p, *self.image_shape)) * self.phases.conj()
        return (self.signs * torch.fft.irfft2(spectrum, s=self.image_shape[1:])).sum(0)

    def to(self, device: torch.device | str) -> PatternedSensor:
        moved = PatternedSensor.__new__(PatternedSensor)
        vars(moved).update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        return moved


def least_squares(
    measurements: Tensor,
    sensor: Sensor,
    gains: Tensor | None = None,
    *,
    prior: Tensor | None = None,
    weight: float = 1e-2,
    max_iterations: int = 60,
) -> Tensor:
    """argmin ||diag(g) A x - y||^2 + weight ||x - prior||^2 by conjugate gradients.

    Args:
        measurements: y, of the sensor's `measurement_shape`.
        sensor: A.
        gains: of its `gains_shape`; None is 1 everywhere, as if the sensor were calibrated.
        prior: (3, H, W); None is grey, 0.5.
        weight: > 0.
        max_iterations: of the solver; it ends at a residual of 1e-4.

    Returns:
        (3, H, W)
    """
    gains = torch.ones(sensor.gains_shape, device=measurements.device) if gains is None else gains
    prior = measurements.new_full(sensor.image_shape, 0.5) if prior is None else prior
    found = conjugate_directions(
        lambda v: sensor.adjoint(gains.square() * sensor.forward(v)) + weight * v,
        sensor.adjoint(gains * measurements) + weight * prior,
        x0=prior,
        max_iterations=max_iterations,
    )
    return found.x
