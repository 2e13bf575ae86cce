"""Pictures and clouds made here, dropped on the page: their settings come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from .metadata import checked_settings, read_embedded
from .settings import usable_value
from .tab import Tab
from .words import in_plain_words

__all__ = ["open_button", "read_back", "wire"]


def open_button() -> gr.UploadButton:
    """The button that opens such a file."""
    return gr.UploadButton(
        "Open a file made here", file_types=[".png", ".ply"], size="sm", elem_id="open-picture", scale=0, min_width=220
    )


def wire(tabs: Mapping[str, Tab], bar: gr.Tabs, opened: gr.UploadButton) -> None:
    """Makes the button put a file's settings back; what is dropped on the page goes to it by ``page.js``.

    Args:
        tabs: by id.
        bar: the tabs' bar.
        opened: what :func:`open_button` gave.
    """
    places = [(tab, name) for tab, entry in tabs.items() for name in entry.settings]

    @in_plain_words
    def read(path: str | None) -> list[Any]:
        tab, values = read_back(path, tabs)
        if not values:
            gr.Warning("This file says nothing of how it was made. Those downloaded here do.")
            return [gr.skip()] * (len(places) + 1)
        gr.Info("The file's settings are back.")
        put = [values[name] if of == tab and name in values else gr.skip() for of, name in places]
        return [*put, gr.Tabs(selected=tab)]

    components = [tabs[tab].settings[name] for tab, name in places]
    opened.upload(read, [opened], [*components, bar], api_visibility="private", show_progress="hidden")


def read_back(path: str | None, tabs: Mapping[str, Tab]) -> tuple[str, dict[str, Any]]:
    """A tab, and values of its settings, from what a file says about how it was made.

    Args:
        path: of any file.
        tabs: by id; pictures of the command line, which name none, go to the first.

    Returns:
        The tab's id, and what its components take; empty where the file says nothing that they do.
    """
    found = read_embedded(path) if path else None
    if found is None:
        return "", {}
    tab = found.tab if found.tab in tabs else next(iter(tabs))
    settings = found.settings if tabs[tab].job is None else checked_settings(tabs[tab].job, found.settings)[0]
    values = {
        name: usable_value(component, settings[name])
        for name, component in tabs[tab].settings.items()
        if name in settings
    }
    return tab, {name: value for name, value in values.items() if value is not None}
