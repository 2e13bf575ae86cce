"""Settings that survive a reload, in the browser's own storage, and that travel in the page's address."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import gradio as gr

from .tab import Tab

__all__ = ["link_button", "usable_value", "wire"]

_LONGEST_TEXT = 2_000


def wire(page: gr.Blocks, tabs: Mapping[str, Tab], bar: gr.Tabs) -> None:
    """Keeps the tabs' settings in the browser, and reads them back, the address before the storage.

    Args:
        page: the blocks, open.
        tabs: by id.
        bar: the tabs' bar.
    """
    names = [(tab, name) for tab, entry in tabs.items() for name in entry.settings]
    components = [tabs[tab].settings[name] for tab, name in names]
    # The key is no secret: it only has to be the same after a restart.
    kept = gr.BrowserState({}, storage_key="trimtab-settings", secret="trimtab-settings")
    keys = json.dumps([f"{tab}.{name}" for tab, name in names])
    gr.on(
        [component.change for component in components],
        None,
        components,
        [kept],
        js=f"(...values) => [Object.fromEntries({keys}.map((key, i) => [key, values[i]]))]",
        show_progress="hidden",
        api_visibility="private",
    )

    def restore(stored: Any, request: gr.Request) -> list[Any]:
        asked = dict(request.query_params) if request is not None else {}
        tab_of_link = asked.pop("tab", "")
        stored = stored if isinstance(stored, dict) else {}
        values = []
        for (tab, name), component in zip(names, components, strict=True):
            given = asked.get(name) if tab == tab_of_link else None
            given = stored.get(f"{tab}.{name}") if given is None else given
            value = None if given is None else usable_value(component, given)
            values.append(gr.skip() if value is None else value)
        return [*values, gr.Tabs(selected=tab_of_link) if tab_of_link in tabs else gr.skip()]

    page.load(restore, [kept], [*components, bar], show_progress="hidden", api_visibility="private")


def usable_value(component: Any, given: Any) -> Any:
    """A value of a component from what anybody wrote; None if it is not one.

    Args:
        component: a text box, number, slider, checkbox, dropdown or radio.
        given: from the address (text) or the storage (JSON).
    """
    if isinstance(component, (gr.Dropdown, gr.Radio)):
        values = [value for _, value in component.choices]
        return next((value for value in values if str(value) == str(given)), None)
    if isinstance(component, gr.Checkbox):
        return {"true": True, "false": False}.get(str(given).lower())
    if isinstance(component, (gr.Slider, gr.Number)):
        try:
            value = float(given)
        except (TypeError, ValueError):
            return None
        low, high = component.minimum, component.maximum
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            return None
        whole = (
            getattr(component, "precision", None) == 0 or float(getattr(component, "step", None) or 0.5).is_integer()
        )
        return int(value) if whole else value
    return given[:_LONGEST_TEXT] if isinstance(given, str) else None


def link_button(tab: str, entry: Tab) -> None:
    """A button that puts a tab's settings into the page's address, and the address into the clipboard."""
    names = json.dumps(list(entry.settings))
    button = gr.Button("Copy link", size="sm", elem_id=f"{tab}-link")
    button.click(
        None,
        list(entry.settings.values()),
        [button],
        js=f"""async (...values) => {{
            const url = new URL(window.location.href.split('?')[0]);
            url.searchParams.set('tab', {json.dumps(tab)});
            {names}.forEach((name, i) => url.searchParams.set(name, values[i] ?? ''));
            window.history.replaceState(null, '', url);
            try {{ await navigator.clipboard.writeText(url.href); return 'Link copied'; }}
            catch {{ return 'The link is in the address bar'; }}
        }}""",
        show_progress="hidden",
        api_visibility="private",
    ).then(
        None,
        None,
        [button],
        js="async () => { await new Promise((done) => setTimeout(done, 2500)); return 'Copy link'; }",
        show_progress="hidden",
        api_visibility="private",
    )
