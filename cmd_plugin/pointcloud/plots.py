"""Pictures of scored clouds: matplotlib for paper and terminal, plotly to turn in a browser."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cmd_plugin.errors import ShapeError, require
from cmd_plugin.runs.figures import SEQUENTIAL, figure_style, new_figure, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_cloud", "plot_views", "write_view"]

_ELEVATION, _AZIMUTH = 20.0, -60.0  # degrees from which both pictures look
_DISTANCE = 1.75  # of the page's camera, in sizes of the cloud


def plot_cloud(points: Tensor, scores: Tensor, ax: Any, *, up: int = 2) -> Any:
    """Draw a cloud into 3-D axes of matplotlib, important points bright, large and in front.

    Args:
        points: [N, 3 or more].
        scores: [N] in [0, 1], see :meth:`PointImportance.display`.
        ax: Axes with ``projection="3d"``.
        up: Which axis of the cloud points up, 0 to 2.

    Returns:
        What matplotlib drew, for a colour bar.

    Raises:
        ShapeError: If points and scores do not fit.
    """
    places, values = _checked(points, scores, up)
    order = np.argsort(values, kind="stable")
    places, values = places[order], values[order]
    drawn = ax.scatter(
        *places.T,
        c=values,
        cmap=SEQUENTIAL,
        vmin=0.0,
        vmax=1.0,
        s=3.0 + 12.0 * values,
        linewidths=0,
    )
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    reach = float((places.max(axis=0) - places.min(axis=0)).max()) / 2 or 1.0
    limits = [(float(m - reach), float(m + reach)) for m in middle]
    ax.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
    ax.set_box_aspect((1, 1, 1), zoom=1.3)
    ax.view_init(elev=_ELEVATION, azim=_AZIMUTH)
    ax.set_axis_off()
    return drawn


def plot_views(
    points: Tensor, scores: Mapping[str, Tensor], title: str = "", *, up: int = 2
) -> Figure:
    """Draw the same cloud once for each of several scores, side by side.

    Args:
        points: [N, 3 or more].
        scores: Name and [N] values in [0, 1] of each picture.
        title: Above all of them.
        up: Which axis of the cloud points up, 0 to 2.
    """
    with figure_style():
        figure = new_figure(4.2 * len(scores) + 0.8, 4.4)
        drawn, panels = None, []
        for number, (name, values) in enumerate(scores.items(), 1):
            ax = figure.add_subplot(1, len(scores), number, projection="3d")
            drawn = plot_cloud(points, values, ax, up=up)
            ax.set_title(name)
            panels.append(ax)
        if drawn is not None:
            figure.colorbar(drawn, ax=panels, shrink=0.7, label="importance, largest = 1")
        figure.suptitle(title)
    return figure


def write_view(
    path: str | Path,
    points: Tensor,
    scores: Mapping[str, Tensor],
    title: str = "",
    *,
    up: int = 2,
) -> None:
    """Write an HTML page that shows a cloud in 3-D, to turn, zoom and read off, without a network.

    A menu switches between the scores. Under the pointer stand a point's number, its score, and its
    coordinates in the order of ``points``. The page holds plotly itself (about 5 MB).

    Args:
        path: File to write.
        points: [N, 3 or more].
        scores: Name and [N] values of each entry of the menu; colours run from 0 to the largest.
        title: Above the picture.
        up: Which axis of the cloud points up, 0 to 2.

    Raises:
        MissingDependency: If plotly is not installed.
        ShapeError: If points and scores do not fit.
        InputError: If the page cannot be written.
    """
    graphs = require("plotly.graph_objects", "points")
    traces: list[Any] = []
    own = points[:, :3].cpu().double().numpy()  # as in the file, whatever points up here
    for name, tensor in scores.items():
        places, values = _checked(points, tensor, up)
        share = values / max(float(values.max()), 1e-9)
        safe = html.escape(name)
        traces.append(
            graphs.Scatter3d(
                x=places[:, 0],
                y=places[:, 1],
                z=places[:, 2],
                mode="markers",
                name=name,
                visible=not traces,
                customdata=np.column_stack((np.arange(len(values)), values, own)),
                hovertemplate="point %{customdata[0]:d}<br>" + safe + " %{customdata[1]:.4g}<br>"
                "x %{customdata[2]:.3f}, y %{customdata[3]:.3f}, z %{customdata[4]:.3f}"
                "<extra></extra>",
                marker={
                    "size": 3.5 + 5.0 * share,
                    "color": share,
                    "colorscale": SEQUENTIAL.capitalize(),
                    "cmin": 0.0,
                    "cmax": 1.0,
                    "colorbar": {
                        "title": {"text": "importance,<br>largest = 1"},
                        "len": 0.7,
                        "thickness": 18,
                    },
                    "line": {"width": 0},
                },
            )
        )
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": [n == name for n in scores]}]}
        for name in scores
    ]
    figure = graphs.Figure(traces)
    turn, rise = math.radians(_AZIMUTH), math.radians(_ELEVATION)
    figure.update_layout(
        title={"text": html.escape(title), "x": 0.02, "font": {"size": 20}},
        font={"size": 14},
        showlegend=False,
        margin={"l": 0, "r": 0, "t": 60, "b": 0},
        scene={
            "aspectmode": "data",  # a unit is as long along all three axes
            "camera": {
                "eye": {
                    "x": _DISTANCE * math.cos(rise) * math.cos(turn),
                    "y": _DISTANCE * math.cos(rise) * math.sin(turn),
                    "z": _DISTANCE * math.sin(rise),
                }
            },
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
            "zaxis": {"visible": False},
        },
        updatemenus=[{"buttons": buttons, "x": 0.02, "y": 0.98, "xanchor": "left"}],
        annotations=[
            {
                "text": "drag to turn, scroll to zoom, point to read off",
                "xref": "paper",
                "yref": "paper",
                "x": 0.02,
                "y": 0.01,
                "showarrow": False,
                "font": {"size": 12, "color": "grey"},
            }
        ],
    )
    # With a name of its own for the frame, where plotly draws one: the same input, the same page.
    plot = figure.to_html(
        include_plotlyjs=True, full_html=False, default_height="100vh", div_id="view"
    )
    write_page(path, title or "Point importance", [plot], fill=True)


def _checked(points: Tensor, scores: Tensor, up: int) -> tuple[Any, Any]:
    """Coordinates [N, 3], turned so that ``up`` comes last, and values [N]."""
    if points.ndim != 2 or points.shape[1] < 3 or scores.shape != points.shape[:1]:
        raise ShapeError(
            f"points must be [N, 3] and scores [N], got {tuple(points.shape)} and "
            f"{tuple(scores.shape)}."
        )
    axes = [(up + 1) % 3, (up + 2) % 3, up]
    return points[:, axes].cpu().double().numpy(), scores.cpu().double().numpy()
