"""Where a run is among its scheduler's timesteps, and the noise levels there."""

from typing import Any

from .prediction import AffinePrediction, NoiseSchedule

__all__ = ["RunProgress"]


class RunProgress:
    """Counts the evaluations of one run, from the first after ``set_timesteps``.

    ``order`` evaluations make a step. A run may begin in the middle of the timesteps (image-to-image).

    Args:
        scheduler: the run's scheduler.
        whole: whether the run is known to begin at the first timestep.

    Attributes:
        evaluation: how many evaluations are done.
    """

    def __init__(self, scheduler: Any, *, whole: bool = False):
        self.scheduler, self.whole = scheduler, whole
        self.evaluation = 0
        self._schedule: NoiseSchedule | None = None
        self._first: int | None = None  # index of the run's first evaluation among the scheduler's timesteps

    @property
    def order(self) -> int:
        return getattr(self.scheduler, "order", 1)

    @property
    def step(self) -> int:
        """The step that this evaluation belongs to, from 0 at the run's begin."""
        return self.evaluation // self.order

    @property
    def begins_step(self) -> bool:
        return self.evaluation % self.order == 0

    def known_index(self) -> int | None:
        """Which of the scheduler's timesteps comes, if that can be told without asking the device."""
        if self._first is not None:
            return self._first + self.evaluation
        index = getattr(self.scheduler, "step_index", None)
        if index is None:
            index = getattr(self.scheduler, "begin_index", None)
        return 0 if index is None and self.whole else index

    def index(self, timestep: Any) -> int:
        """Which of the scheduler's timesteps this is, read from the device at most once a run."""
        if self._first is None:
            if hasattr(self.scheduler, "_init_step_index") and self.scheduler.step_index is None:
                self.scheduler._init_step_index(timestep)  # what its step() would do first
            index = self.known_index()
            if index is None:
                self._schedule = self._schedule or NoiseSchedule(self.scheduler)
                index = self._schedule.index_of(timestep)
            self._first = index - self.evaluation
        return self._first + self.evaluation

    def predictions(self, index: int, *, required: bool) -> tuple[AffinePrediction | None, AffinePrediction | None]:
        """The conversions at a timestep and where its step ends.

        Args:
            index: of the scheduler's timesteps.
            required: whether a scheduler of unknown noise levels is an error; else it gives (None, None).

        Raises:
            NotImplementedError: for such a scheduler.
        """
        if self._schedule is None:
            try:
                self._schedule = NoiseSchedule(self.scheduler)
            except NotImplementedError:
                if required:
                    raise
                return None, None
        return self._schedule[index], self._schedule[index + 1]
