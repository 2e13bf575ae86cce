"""Clouds in three dimensions, to be turned by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["figure"]

_GIVEN = [[0.0, "#1f4e79"], [0.5, "#3f8fc4"], [1.0, "#9fd3f0"]]
_MADE = [[0.0, "#8a3d12"], [0.5, "#e07a3f"], [1.0, "#ffd08a"]]
_DISTANCE = 2.2
_GREY = "#7d8894"  # readable on light and dark


def figure(clouds: Sequence[Tensor], names: Sequence[str], *, given: int = 0, columns: int = 3) -> Any:
    """Clouds beside one another in one scene.

    Args:
        clouds: (N, 3) each, about unit radius; y is up.
        names: of each, shown below it.
        given: how many of the first are those that were given, in blue; the others are orange.
        columns: in a row.

    Returns:
        A plotly figure, whose view stays where it was turned to when the next one comes.
    """
    import plotly.graph_objects as go

    made = go.Figure()
    count = len(clouds)
    columns = min(columns, count)
    rows = -(-count // columns)
    for index, (cloud, name) in enumerate(zip(clouds, names, strict=True)):
        row, column = divmod(index, columns)
        across, down = _DISTANCE * (column - (columns - 1) / 2), _DISTANCE * ((rows - 1) / 2 - row)
        x, y, z = cloud.detach().float().cpu().unbind(1)
        made.add_scatter3d(
            x=(x + across).numpy(), y=(-z).numpy(), z=(y + down).numpy(), mode="markers", name=name,
            hovertemplate=f"{name}<extra></extra>",
            marker={
                "size": 3.2 if rows == 1 else 2.2,
                "color": (y + 0.25 * z).numpy(),
                "colorscale": _GIVEN if index < given else _MADE,
                "opacity": 1.0,
            },
        )  # fmt: skip
        made.add_scatter3d(
            x=[across], y=[0.0], z=[down - 1.12], mode="text", text=[name], hoverinfo="skip",
            textfont={"size": 13, "color": _GREY},
        )  # fmt: skip
    hidden = {"visible": False}
    back = max(1.0, 0.52 * columns, 0.75 * rows)
    made.update_layout(
        template="none",
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        height=min(640, 240 + 160 * rows),
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        scene={
            "xaxis": hidden,
            "yaxis": hidden,
            "zaxis": hidden,
            "aspectmode": "data",
            "bgcolor": "rgba(0,0,0,0)",
            "camera": {"eye": {"x": 0.45 * back, "y": -1.5 * back, "z": 0.5 * back}},
            "uirevision": "kept",
        },
        uirevision="kept",
    )
    return made
