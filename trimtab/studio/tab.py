"""What a tab gets from the app, and what it gives back."""

from __future__ import annotations

import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from .limits import Limits
from .pictures import Files
from .runs import MODEL, Job, Stop, Update, holder, stream
from .words import status_html

__all__ = ["Studio", "Tab", "seed_input"]

Component = gr.components.Component


@dataclass
class Tab:
    """What a tab's ``build_tab`` returns.

    Attributes:
        settings: components that survive a reload and travel in links, by the names that they have there.
        takes: a picture component into which other tabs send theirs; None takes none.
        gives: a component whose value is the tab's result, a PIL picture; None gives none.
        send_row: where the buttons go that send it and copy the link, such as a ``gr.Row``; needed with ``gives``.
        job: the dataclass of the tab's settings; with it, pictures made by the tab give them back.
        takes_taste: the choice of a reward and the file of the visitor's own one; None takes none.
        gives_taste: a button and the component with the path of the visitor's taste; None gives none.
    """

    settings: Mapping[str, Component] = field(default_factory=dict)
    takes: Component | None = None
    gives: Component | None = None
    send_row: Any = None
    job: type | None = None
    takes_taste: tuple[Component, Component] | None = None
    gives_taste: tuple[Component, Component] | None = None


class Studio:
    """The app's services for its tabs.

    Args:
        limits: what may be asked for.
        on_gpu: wraps the streaming of a job, such as ``spaces.GPU`` on ZeroGPU.
        page: the blocks of the whole page.

    Attributes:
        limits: the limits.
        page: the blocks of the whole page.
        files: files for download.
        kept_taste: keeps the visitor's taste in the browser; outside of the tabs, where it is read when the page opens.
        model: the component with the model's name, an input of every run; invisible where only one is allowed.
    """

    def __init__(
        self, limits: Limits, on_gpu: Callable[[Callable[..., Any]], Callable[..., Any]], page: Any = None
    ) -> None:
        self.limits = limits
        self.page = page
        self.files = Files()
        self.model: Any = None
        self.kept_taste: Any = None
        self._stream = on_gpu(stream)
        self._lock = threading.Lock()
        self._running: dict[tuple[str, str], set[Stop]] = defaultdict(set)
        self._clicked: dict[tuple[str, str], float] = {}
        self._unwanted: dict[tuple[str, str], float] = {}

    def stream(self, job: Job, request: gr.Request | None, tab: str) -> Iterator[Update]:
        """Does a job for this visitor and gives its updates; the last one has ``finished`` set.

        Args:
            job: whose model, if it is one of pictures, must be an allowed one.
            request: of the event.
            tab: the tab's id, by which its stop button finds the run.

        Raises:
            ValueError: the model is not allowed here.
            gr.Error: the job failed; the message is in plain words.
        """
        of_pictures = holder(job) is MODEL
        if of_pictures and job.model not in self.limits.models:
            raise ValueError(f"The model {job.model!r} is not allowed here; takes {', '.join(self.limits.models)}.")
        key = (getattr(request, "session_hash", None) or uuid.uuid4().hex, tab)
        stop = Stop(self.files.folder)
        with self._lock:
            self._running[key].add(stop)
            if self._unwanted.pop(key, 0.0) > self._clicked.pop(key, float("inf")):
                stop.set()  # stopped while it waited in the queue
        # The other models are small: no card is lent for them. By its name it outlives the loop that is left early:
        # closing it waits for a lent card's process, which must have been told to stop before.
        updates = (self._stream if of_pictures else stream)(
            job, stop, self.limits.longest_run, self.limits.largest_picture
        )
        finished = False
        try:
            for update in updates:
                if update.error:
                    finished = True
                    raise gr.Error(update.error, duration=10, print_exception=False)
                finished = update.finished
                yield update
        finally:
            if not finished:
                stop.set()  # the job's thread takes the file away
            with self._lock:
                self._running[key].discard(stop)
                if not self._running[key]:
                    del self._running[key]

    def on_run(
        self,
        tab: str,
        triggers: Sequence[Any] | Any,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        api_name: str,
        status: Component,
        line: str = "model",
    ) -> Any:
        """Registers an event that uses a model: one at a time for all tabs, its place in the queue in ``status``.

        Args:
            tab: the tab's id.
            triggers: such as ``button.click``, or several.
            function: a generator decorated with ``in_plain_words``.
            inputs: its inputs; the name of the model of pictures is the last, added here.
            outputs: its outputs.
            api_name: the endpoint's name.
            status: where waiting is shown.
            line: the queue's line; another than "model" is for another model, whose name is no input.

        Returns:
            The event.
        """
        triggers = list(triggers) if isinstance(triggers, (list, tuple)) else [triggers]
        gr.on(triggers, self._marker(tab), None, None, queue=False, api_visibility="private", show_progress="hidden")
        return gr.on(
            triggers,
            function,
            [*inputs, self.model] if line == "model" else list(inputs),
            list(outputs),
            api_name=api_name,
            concurrency_id=line,
            concurrency_limit=1,
            show_progress="full",
            show_progress_on=[status],
            trigger_mode="once",
        )

    def stop_button(self, tab: str, button: gr.Button) -> None:
        """Makes a button end what this visitor runs in this tab, or waits to."""

        def stop(request: gr.Request) -> None:
            self.stop(request.session_hash, tab)

        button.click(stop, None, None, queue=False, api_visibility="private", show_progress="hidden")

    def stop(self, session: str | None, tab: str | None = None) -> None:
        """Ends the runs of a session, in one tab or in all."""
        with self._lock:
            keys = [key for key in self._running if key[0] == session and tab in (None, key[1])]
            for key in keys:
                for stop in self._running[key]:
                    stop.set()
            if not keys and session and tab:
                self._unwanted[session, tab] = time.monotonic()

    def status(self, tab: str, text: str = "") -> gr.HTML:
        """The line that tells what goes on."""
        return gr.HTML(status_html(text), elem_id=f"{tab}-status", label="Status", show_label=False, padding=False)

    def _marker(self, tab: str) -> Callable[..., None]:
        def clicked(request: gr.Request) -> None:
            with self._lock:
                self._clicked[request.session_hash, tab] = time.monotonic()

        return clicked


def seed_input(elem_id: str, value: int = 0) -> gr.Number:
    """A seed, with a button that gives another."""
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(
            value, label="Seed", info="Another number, another picture", precision=0, minimum=0, min_width=120,
            elem_id=elem_id,
        )  # fmt: skip
        button = gr.Button("New seed", size="sm", scale=0, min_width=100)
    new = "() => Math.floor(Math.random() * 1e6)"
    button.click(None, None, [seed], js=new, api_visibility="private", show_progress="hidden")
    return seed
