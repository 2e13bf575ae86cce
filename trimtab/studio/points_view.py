"""Clouds in three dimensions, to be turned by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["figure"]

_GIVEN = [[0.0, "#1f4e79"], [0.5, "#3f8fc4"], [1.0, "#9fd3f0"]]
_MADE = [[0.0, "#8a3d12"], [0.5, "#e07a3f"], [1.0, "#ffd08a"]]
_ACROSS, _DOWN = 2.1, 2.4
_GREY = "#7d8894"  # readable on light and dark


def figure(clouds: Sequence[Tensor], names: Sequence[str], *, given: int = 0) -> Any:
    """Clouds beside one another in one scene.

    Args:
        clouds: (N, 3) each, about unit radius; y is up.
        names: of each, shown below it.
        given: how many of the first are those that were given, in blue; the others are orange.

    Returns:
        A plotly figure, whose view stays where it was turned to when the next one comes.
    """
    import plotly.graph_objects as go

    made, labels = go.Figure(), []
    count = len(clouds)
    columns = count if count < 4 else 3 if count < 7 else 4
    rows = -(-count // columns)
    for index, (cloud, name) in enumerate(zip(clouds, names, strict=True)):
        row, column = divmod(index, columns)
        across, down = _ACROSS * (column - (columns - 1) / 2), _DOWN * ((rows - 1) / 2 - row)
        x, y, z = cloud.detach().float().cpu().unbind(1)
        made.add_scatter3d(
            x=(x + across).numpy(), y=(-z).numpy(), z=(y + down).numpy(), mode="markers", name=name,
            hoverinfo="skip",
            marker={
                "size": 3.4 - 0.4 * columns,
                "color": (y + 0.25 * z).numpy(),
                "colorscale": _GIVEN if index < given else _MADE,
                "opacity": 1.0,
            },
        )  # fmt: skip
        labels.append(
            {"x": across, "y": -0.8, "z": down - 1.08, "text": name, "showarrow": False, "font": {"color": _GREY}}
        )
    width, height = _ACROSS * columns / 2, _DOWN * rows / 2
    # What is seen at a distance d is 0.83 d high, and the style sheet makes it 1.6 times as wide.
    away = 0.3 + 1.1 * max(2 * height, 2 * width / 1.6) / 2 / 0.83
    made.update_layout(
        template="none",
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        scene={
            "xaxis": {"visible": False, "range": [-width, width]},
            "yaxis": {"visible": False, "range": [-1, 1]},
            "zaxis": {"visible": False, "range": [-height - 0.1, height - 0.1]},
            "aspectmode": "manual",
            "aspectratio": {"x": width, "y": 1, "z": height},
            "annotations": labels,  # not as text in the scene, which takes longer to draw than the points
            "bgcolor": "rgba(0,0,0,0)",
            "camera": {
                "eye": {"x": 0.3 * away, "y": -0.91 * away, "z": 0.28 * away},
                "center": {"x": 0, "y": 0, "z": -0.06},
            },
            "uirevision": f"{columns} {rows}",
        },
        uirevision="kept",
    )
    return made
