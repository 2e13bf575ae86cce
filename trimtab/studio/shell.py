"""The page around the tabs: its head, what the tabs share, and the wiring between them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import reading, settings
from .cache import write_whole
from .gpu import on_gpu
from .libraries import import_in_background
from .limits import BUNDLED, Limits
from .tab import Studio, Tab
from .taste_file import TASTE
from .theme import theme

__all__ = ["build_shell", "options_of_launch"]

_HEAD = """# trimtab
Make pictures, improve them, edit them in words. The model stays frozen: it is steered while it works, and you watch."""


def build_shell(names: Sequence[str]) -> gr.Blocks:
    """Builds the page.

    Args:
        names: modules of the tabs, in their order.
    """
    write_whole()
    limits = Limits.from_environment()
    modules = [importlib.import_module(f".{name}", __package__) for name in names]
    modules = [module for module in modules if getattr(module, "is_available", lambda: True)()]
    with gr.Blocks(title="trimtab", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        studio = Studio(limits, on_gpu, page)
        with gr.Row(elem_id="top"):
            gr.Markdown(_HEAD, elem_id="head")
            opened = reading.open_button()
        studio.model = gr.Dropdown(
            [("The bundled model" if name == BUNDLED else name, name) for name in limits.models],
            value=limits.models[0],
            label="Model",
            visible=len(limits.models) > 1,
            elem_id="model",
        )
        # The key is no secret: it only has to be the same after a restart.
        studio.kept_taste = gr.BrowserState("", storage_key="trimtab-taste", secret="trimtab-taste")
        tabs: dict[str, Tab] = {}
        with gr.Tabs(elem_id="tabs") as bar:
            for module in modules:
                # All children are there from the start: settings are put back into tabs that were never opened.
                with gr.Tab(module.TITLE, id=module.ID, render_children=True):
                    tabs[module.ID] = tab = module.build_tab(studio)
                    with tab.send_row or gr.Row(elem_classes="tools"):
                        settings.link_button(module.ID, tab)
        _wire_taste(tabs, bar)
        _wire_pictures(tabs, {module.ID: module.TITLE for module in modules}, bar)
        settings.wire(page, tabs, bar)
        reading.wire(tabs, bar, opened)
        own = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
        page.load(None, None, None, js=own, api_visibility="private", show_progress="hidden")
        page.load(import_in_background, api_visibility="private", show_progress="hidden", queue=False)
        _end_with_session(page, studio)
    page.queue(max_size=limits.queue_length, default_concurrency_limit=8)
    return page


def options_of_launch() -> dict[str, Any]:
    """Keyword arguments of ``launch``."""
    limits = Limits.from_environment()
    return {
        "theme": theme(),
        "css_paths": Path(__file__).with_name("style.css"),
        "max_file_size": f"{limits.largest_upload}mb",
        "show_error": False,
        "run_history": False,
        "footer_links": ["api", "settings"],
        "ssr_mode": False,
        # Whether it answers is not asked at the start: on a busy machine an answer after 3 s would end the app.
        "_frontend": False,
        "share": False if "SPACE_ID" not in os.environ else None,
    }


def _wire_pictures(tabs: dict[str, Tab], titles: dict[str, str], bar: gr.Tabs) -> None:
    """Buttons that send one tab's picture into another."""
    for source, tab in tabs.items():
        if tab.gives is None or tab.send_row is None:
            continue
        with tab.send_row:
            for target, other in tabs.items():
                if target == source or other.takes is None:
                    continue
                button = gr.Button(f"Send to {titles[target]}", size="sm", elem_id=f"{source}-to-{target}")
                texts = [tab.settings.get("prompt"), other.settings.get("source_prompt")]
                texts = texts if None not in texts else []
                button.click(
                    _sent(target),
                    [tab.gives, *texts[:1]],
                    [other.takes, bar, *texts[1:]],
                    api_visibility="private",
                    show_progress="hidden",
                )


def _sent(target: str) -> Any:
    """What a button that sends a picture does; its prompt, where there is one, tells what it shows."""

    def send(picture: Any, prompt: str | None = None) -> tuple[Any, ...]:
        texts = [] if prompt is None else [prompt]
        if picture is None:
            gr.Warning("There is no picture yet.")
            return (gr.skip(), gr.skip(), *(gr.skip() for _ in texts))
        return (picture, gr.Tabs(selected=target), *texts)

    return send


def _wire_taste(tabs: dict[str, Tab], bar: gr.Tabs) -> None:
    """The visitor's own taste: wherever it can be used it is the one of now, and a button chooses it there."""
    for giver in (tab for tab in tabs.values() if tab.gives_taste):
        button, path = giver.gives_taste
        for target, tab in tabs.items():
            if tab.takes_taste is None:
                continue
            reward, file = tab.takes_taste
            quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            path.change(lambda path: path or None, [path], [file], **quiet)
            button.click(_taste_sent(target), [path], [reward, file, bar], **quiet)


def _taste_sent(target: str) -> Any:
    """What the button does that uses a taste."""

    def send(path: str) -> tuple[Any, ...]:
        if not path:
            gr.Warning("There is no taste yet.")
            return (gr.skip(),) * 3
        return TASTE, path, gr.Tabs(selected=target)

    return send


def _end_with_session(page: gr.Blocks, studio: Studio) -> None:
    def left(request: gr.Request) -> None:
        studio.stop(request.session_hash)

    page.unload(left)
