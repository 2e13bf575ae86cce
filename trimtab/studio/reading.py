"""Pictures made here, dropped on the page: their settings come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from .metadata import checked_settings, read_embedded
from .settings import usable_value
from .tab import Tab
from .words import in_plain_words

__all__ = ["open_button", "read_back", "wire"]

# Files dropped where no component takes them go to the upload button's input.
_DROPS = """() => {
    const input = document.querySelector('input[data-testid="open-picture-upload-button"]')
        ?? document.querySelector('#open-picture')?.parentElement?.querySelector('input[type=file]');
    if (!input || window.trimtabDrops) return;
    window.trimtabDrops = true;
    const taken = (event) => event.target.closest?.('button, input, textarea, [data-testid=image], .image-container');
    const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
    const show = (on) => document.body.classList.toggle('dropping', on);
    document.addEventListener('dragover', (event) => {
        if (!hasFiles(event)) return;
        show(!taken(event));
        if (!taken(event)) event.preventDefault();
    });
    document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) show(false); });
    document.addEventListener('drop', (event) => {
        show(false);
        if (!hasFiles(event) || taken(event)) return;
        event.preventDefault();
        const files = new DataTransfer();
        files.items.add(event.dataTransfer.files[0]);
        input.files = files.files;
        input.dispatchEvent(new Event('change', { bubbles: true }));
    });
}"""


def open_button() -> gr.UploadButton:
    """The button that opens such a picture."""
    return gr.UploadButton(
        "Open a picture made here", file_types=[".png"], size="sm", elem_id="open-picture", scale=0, min_width=220
    )


def wire(page: gr.Blocks, tabs: Mapping[str, Tab], bar: gr.Tabs, opened: gr.UploadButton) -> None:
    """Makes the button, and a drop anywhere on the page, put a picture's settings back.

    Args:
        page: the blocks, open.
        tabs: by id.
        bar: the tabs' bar.
        opened: what :func:`open_button` gave.
    """
    places = [(tab, name) for tab, entry in tabs.items() for name in entry.settings]

    @in_plain_words
    def read(path: str | None) -> list[Any]:
        tab, values = read_back(path, tabs)
        if not values:
            gr.Warning("This picture says nothing of how it was made. Pictures downloaded here do.")
            return [gr.skip()] * (len(places) + 1)
        gr.Info("The picture's settings are back.")
        put = [values[name] if of == tab and name in values else gr.skip() for of, name in places]
        return [*put, gr.Tabs(selected=tab)]

    components = [tabs[tab].settings[name] for tab, name in places]
    opened.upload(read, [opened], [*components, bar], api_visibility="private", show_progress="hidden")
    page.load(None, None, None, js=_DROPS, api_visibility="private", show_progress="hidden")


def read_back(path: str | None, tabs: Mapping[str, Tab]) -> tuple[str, dict[str, Any]]:
    """A tab, and values of its settings, from what a picture says about how it was made.

    Args:
        path: of any file.
        tabs: by id; pictures of the command line, which name none, go to the first.

    Returns:
        The tab's id, and what its components take; empty where the picture says nothing that they do.
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
