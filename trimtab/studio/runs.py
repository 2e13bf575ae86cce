"""Runs of jobs: in a thread of their own, with notes, previews, and an end when the person wants it.

Where a ZeroGPU Space lends a card for each call, the work runs in a process that it forks: so jobs and updates are
picklable, and the wish to stop is a file.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .libraries import wait_for_import
from .model import LoadedModel, SharedModel
from .words import plain_words

__all__ = ["MODEL", "Job", "Run", "Stop", "Stopped", "Update", "holder", "stream"]

MODEL = SharedModel()
"""The model of this process."""

_HEARTBEAT = 0.5
"""Seconds after which an update comes even without news, so that a run can be left at any time."""


class Stopped(Exception):
    """A run is to end; the message says why, in plain words."""


class Job(Protocol):
    """What a tab does; a frozen dataclass of plain settings.

    A job whose model is not one of pictures has a class attribute ``holder``, the ``SharedModel`` that holds it.
    """

    model: str

    def seconds(self) -> float:
        """How long it takes on a GPU, about; ZeroGPU lends the card for so long."""

    def run(self, loaded: LoadedModel, run: Run) -> None:
        """Does it, and sends what there is by ``run.emit``."""


@dataclass(frozen=True)
class Update:
    """One message of a run.

    Attributes:
        note: what goes on, in plain words.
        result: the last that the job emitted; None before that.
        new: ``result`` was not in an earlier update.
        finished: this is the last update.
        stopped: why it ended early; empty if it did not.
        seconds: since the work began, loading excluded once it is over.
        error: what went wrong, in plain words.
    """

    note: str
    result: Any = None
    new: bool = False
    finished: bool = False
    stopped: str = ""
    seconds: float = 0.0
    error: str = ""


class Stop:
    """A wish to stop that crosses processes: a file that appears.

    Args:
        folder: of the files; None is the system's for temporary ones.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = Path(folder or tempfile.gettempdir()) / f"trimtab-stop-{os.getpid()}-{uuid.uuid4().hex}"
        self._wished = False

    def set(self) -> None:
        """Wishes it, once: a run that has ended took the file away, and it is not to come back."""
        if not self._wished:
            self._wished = True
            self._path.touch()

    def is_set(self) -> bool:
        """Whether it is wished."""
        return self._path.exists()

    def clear(self) -> None:
        """Takes the file away."""
        self._path.unlink(missing_ok=True)


class Run:
    """What a job sees of its run.

    Args:
        stop: the wish to stop.
        longest: seconds.
        send: takes (note, result or None).

    Attributes:
        largest_picture: longest side in pixels.
    """

    def __init__(self, stop: Stop, longest: float, largest_picture: int, send: Callable[[str, Any], None]) -> None:
        self.largest_picture = largest_picture
        self._stop, self._longest, self._send = stop, longest, send
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._began

    def begin(self) -> None:
        """The model is there: the clock starts anew."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Forgets the wish to stop."""
        self._stop.clear()

    def check(self) -> None:
        """Ends the run if it is to.

        Raises:
            Stopped: if so.
        """
        if self._stop.is_set():
            raise Stopped("Stopped.")
        if self.seconds > self._longest:
            raise Stopped(f"Stopped after {self._longest:g} seconds, the longest run here.")

    def emit(self, result: Any, note: str = "") -> None:
        """Sends all that there is so far; picklable, with no tensors on a GPU."""
        self._send(note, result)

    def note(self, note: str) -> None:
        """Says what goes on."""
        self._send(note, None)

    def step(
        self,
        total: int,
        label: str = "step",
        *,
        on_preview: Callable[[Any], None] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Callable[..., dict[str, Any]]:
        """A ``callback_on_step_end`` for stock calls: notes each step, checks, and gives previews.

        Args:
            total: steps that will be made, for the note.
            label: for the note.
            on_preview: gets a PIL picture, the denoised estimate, about twice a second.
            height: of the pictures, in pixels.
            width: of the pictures, in pixels.
        """
        from trimtab.pipelines.preview import StepPreview

        preview = StepPreview(on_preview, height=height, width=width) if on_preview else None
        count = 0

        def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal count
            self.check()
            count += 1
            if preview is not None:
                preview(pipe, step, timestep, tensors)
            self.note(f"{label} {min(count, total)} of {total}")
            return {}

        return step_end


def holder(job: Job) -> SharedModel:
    """What holds a job's model: that of pictures, where it names no other."""
    return getattr(job, "holder", MODEL)


def stream(job: Job, stop: Stop, longest: float, largest_picture: int) -> Iterator[Update]:
    """Does a job and gives its updates; left early, it ends the job within a step.

    Args:
        job: picklable.
        stop: the wish to stop.
        longest: seconds.
        largest_picture: longest side in pixels.
    """
    updates: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    run = Run(stop, longest, largest_picture, lambda note, result: updates.put((note, result)))
    thread = threading.Thread(target=_work, args=(job, run, updates), daemon=True, name="trimtab-run")
    thread.start()
    note, result, over = "Starting", None, False
    try:
        while True:
            fresh = []
            try:
                fresh.append(updates.get(timeout=_HEARTBEAT))
                while True:
                    fresh.append(updates.get_nowait())
            except queue.Empty:
                pass
            end = next((entry for entry in fresh if isinstance(entry[1], Update)), None)
            news = [value for _, value in fresh if value is not None and not isinstance(value, Update)]
            note = next((text for text, _ in reversed(fresh) if text), note)
            result = news[-1] if news else result
            if end is None:
                yield Update(note, result, bool(news), seconds=run.seconds)
            else:
                last, over = end[1], True
                yield Update(last.note, result, bool(news), True, last.stopped, last.seconds, last.error)
                return
    finally:
        if not over:
            stop.set()


def _work(job: Job, run: Run, updates: queue.SimpleQueue[tuple[str, Any]]) -> None:
    wait_for_import()
    from trimtab.pipelines.vocabulary import UnknownWordsWarning

    stopped, error = "", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownWordsWarning)  # told in the page
            with holder(job).use(job.model, run.note, run.check) as loaded:
                run.begin()
                run.check()
                job.run(loaded, run)
    except Stopped as reason:
        stopped = str(reason)
    except Exception as problem:
        error = plain_words(problem)
        if not isinstance(problem, ValueError):
            import logging

            logging.getLogger(__name__).warning("%s failed", type(job).__name__, exc_info=problem)
    run.end()
    note = stopped or error or f"Done in {run.seconds:.1f} s."
    updates.put(("", Update(note, finished=True, stopped=stopped, seconds=run.seconds, error=error)))
