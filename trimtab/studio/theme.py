"""How the page looks: calm surfaces, readable in light and dark."""

import gradio as gr

__all__ = ["theme"]


def theme() -> gr.themes.Base:
    """The page's theme; its fonts are the system's, so nothing is fetched."""
    base = gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    both = {
        "block_title_background_fill": "none",
        "block_title_text_color": "*body_text_color",
        "block_label_text_color": "*body_text_color",
        "block_label_background_fill": "*background_fill_primary",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "button_primary_text_color": "white",
    }
    dark = {f"{name}_dark": value for name, value in both.items()}
    return base.set(
        **both,
        **dark,
        block_title_padding="0",
        block_title_text_weight="600",
        block_label_text_weight="600",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_shadow="none",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        # The stock greys are too faint for small text on these grounds.
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
