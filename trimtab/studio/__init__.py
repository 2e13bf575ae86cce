"""The app: ``build()`` makes it, ``app.py``, ``trimtab app`` and ``make app`` launch it.

Nothing here imports gradio, torch or a model before :func:`build` is called, and no model is loaded before a person
uses one.

How a tab's file looks
----------------------

A tab is one module of this package, named in :data:`TABS`. It has

- ``ID``, a short name for addresses and element ids, and ``TITLE``, what the tab shows;
- a **job**: a frozen dataclass of plain settings (numbers, strings, PIL pictures), so that it can be pickled. Its
  ``__post_init__`` checks them and raises ``ValueError`` in plain words; ``model`` names the model;
  ``seconds()`` estimates how long it takes on a GPU; ``run(loaded, run)`` does the work on a ``LoadedModel``. There
  ``run.emit(result, note)`` sends what there is so far (always all of it: an update may be skipped by the next), and
  ``run.step(...)`` is a Diffusers ``callback_on_step_end`` that counts steps, sends previews and ends the run when it
  is to stop. Work without such a callback calls ``run.check()`` as often. A job knows nothing of gradio. One whose
  model makes no pictures has a class attribute ``holder``, the ``SharedModel`` that holds it, and its event is
  registered with a ``line`` of its own;
- ``python_code(job)``: the trimtab code that makes the same result;
- ``build_tab(studio) -> Tab``: makes the components inside the ``gr.Tab`` that is already open, and its events.

An event that works is a generator with typed parameters, ``request: gr.Request`` and a docstring (which becomes the
endpoint's description), decorated with ``@in_plain_words``::

    @in_plain_words
    def create(prompt: str, seed: int, ..., request: gr.Request) -> Iterator[tuple[...]]:
        job = CreateJob(prompt=prompt, seed=seed, ...)
        for update in studio.stream(job, request, ID):
            yield what the components show of update.result, and status_html(update)
        yield the end: with the file to download (``studio.files``) and ``python_code(job)``

and is registered by ``studio.on_run(ID, button.click, create, inputs, outputs, api_name="create", status=status)``,
which puts it into the one queue line of the model. ``studio.stop_button(ID, button)`` ends the run of that session in
that tab within a step; what was emitted stays, and the last yield still comes. The last update has ``finished`` set,
and ``stopped`` says why if it ended early.

The components lie in a ``gr.Row(elem_classes="tab-grid")`` with three columns, ``part-ask``, ``part-result`` and
``part-settings``, which ``style.css`` puts side by side or, on a phone, one below the other; small buttons in a row
``tools``. Curves are ``chart.curve_svg``, seeds ``tab.seed_input``.

``Tab.settings`` names the components whose values survive a reload and travel in the link to the page
(``?tab=create&prompt=...``); ``studio.settings`` wires them. ``Tab.takes`` is a picture component into which other
tabs can send theirs; ``Tab.gives`` is a component whose value is a picture, with the row where the buttons go.

With ``Tab.job``, the job's class, pictures downloaded from the tab give their settings back when they are opened or
dropped on the page (``reading``); ``page.js`` is the page's own code.

Pictures come in through ``pictures.Picture``, which looks at the content and not the name. Errors for the person are
``ValueError``; everything else is caught in one place (``words.plain_words``).
"""

from typing import Any

__all__ = ["TABS", "build", "launch_options"]

TABS = ("create", "improve", "edit", "points", "taste")
"""The modules of this package that are tabs, in their order."""


def build() -> Any:
    """The app as a ``gradio.Blocks``, with its queue; no model is loaded, but for ZeroGPU's first.

    Returns:
        The blocks: ``build().launch(**launch_options())``.

    Raises:
        ImportError: if gradio is missing.
        ValueError: if an environment variable cannot be used; the message names it.
    """
    from .gpu import on_zero_gpu
    from .limits import Limits
    from .runs import MODEL
    from .shell import build_shell

    if on_zero_gpu():  # what a lent card's process loads is lost with it: it finds the model in this one
        with MODEL.use(Limits.from_environment().models[0], print, lambda: None):
            pass
    return build_shell(TABS)


def launch_options() -> dict[str, Any]:
    """Keyword arguments of ``launch`` that belong to the app: looks, limits of uploads, no analytics."""
    from .shell import options_of_launch

    return options_of_launch()
