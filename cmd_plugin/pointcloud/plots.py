"""Pictures of scored clouds: of matplotlib, pages of plotly to turn in a browser, coloured PLY."""

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
from cmd_plugin.runs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_cloud", "plot_views", "write_ply", "write_view"]

_ELEVATION, _AZIMUTH = 20.0, -60.0  # degrees from which both pictures look
_FIELD = 45.0  # degrees that the page's camera sees from top to bottom
_EDGE = 1.12  # how much more than the cloud is in the picture, for points have a size
# A few points win hundreds of channels, and most a handful: by their values all but those few would
# have one colour.
_ROOTED = ("critical++",)
# In a narrow window the camera steps back, as far as the width asks for.
_KEEP_IN_VIEW = """
const view = document.getElementById('{plot_id}');
let back = 1;
function fit() {
  const size = view._fullLayout._size;
  const wanted = Math.max(1, size.h / Math.max(size.w, 1));
  if (Math.abs(wanted - back) < 0.01) { return; }
  const camera = view._fullLayout.scene._scene
    ? view._fullLayout.scene._scene.getCamera() : view.layout.scene.camera;
  const eye = camera.eye;
  for (const axis of ['x', 'y', 'z']) { eye[axis] *= wanted / back; }
  back = wanted;
  Plotly.relayout(view, {'scene.camera': camera});
}
window.addEventListener('resize', () => setTimeout(fit, 200));
fit();
"""


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
        scores: Name and [N] values from 0 on of each picture; colours run from 0 to the largest,
            and those of counts by their square roots.
        title: Above all of them.
        up: Which axis of the cloud points up, 0 to 2.
    """
    with figure_style():
        figure = new_figure(4.2 * len(scores) + 0.8, 4.4)
        drawn, panels = None, []
        for number, (name, values) in enumerate(scores.items(), 1):
            ax = figure.add_subplot(1, len(scores), number, projection="3d")
            shares, _ = _on_scale(name, values.cpu().double().numpy())
            drawn = plot_cloud(points, points.new_tensor(shares), ax, up=up)
            ax.set_title(name)
            panels.append(ax)
        if drawn is not None:
            label = "importance, largest = 1"
            label += "".join(f"\n({name}: square root)" for name in scores if name in _ROOTED)
            figure.colorbar(drawn, ax=panels, shrink=0.7, label=label)
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
        scores: Name and [N] values of each entry of the menu; colours run from 0 to the largest,
            and those of counts by their square roots.
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
        share, ticks = _on_scale(name, values)
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
                        "title": {"text": safe + ("<br>square root" if name in _ROOTED else "")},
                        "tickvals": list(ticks),
                        "ticktext": [f"{value:.3g}" for value in ticks.values()],
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
    ranges, distance = _frame(_turned(points, up))
    figure.update_layout(
        title={"text": html.escape(title), "x": 0.02, "font": {"size": 20}},
        font={"size": 14},
        showlegend=False,
        margin={"l": 0, "r": 0, "t": 60, "b": 0},
        scene={
            "aspectmode": "data",  # a unit is as long along all three axes
            "camera": {
                "eye": {
                    "x": distance * math.cos(rise) * math.cos(turn),
                    "y": distance * math.cos(rise) * math.sin(turn),
                    "z": distance * math.sin(rise),
                }
            },
            "xaxis": {"visible": False, "range": ranges[0]},
            "yaxis": {"visible": False, "range": ranges[1]},
            "zaxis": {"visible": False, "range": ranges[2]},
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
        include_plotlyjs=True,
        full_html=False,
        default_height="100vh",
        div_id="view",
        config={"responsive": True},
        post_script=_KEEP_IN_VIEW,
    )
    write_page(path, title or "Point importance", [plot], fill=True)


def write_ply(path: str | Path, points: Tensor, scores: Tensor, measure: str = "") -> None:
    """Write a cloud as binary PLY, each point in the colour of its score, for any mesh viewer.

    Args:
        path: File to write.
        points: [N, 3 or more], written as they are.
        scores: [N] from 0 on; also written as they are, as the property ``quality``.
        measure: Its name; colours of counts run by their square roots.

    Raises:
        ShapeError: If points and scores do not fit.
        InputError: If the file cannot be written.
    """
    import matplotlib as mpl

    places, values = _checked(points, scores, 2)
    shares, _ = _on_scale(measure, values)
    colours = mpl.colormaps[SEQUENTIAL](shares, bytes=True)[:, :3]
    kinds = {**dict.fromkeys("xyz", "<f4"), **dict.fromkeys(("red", "green", "blue"), "u1")}
    kinds["quality"] = "<f4"
    rows = np.empty(len(values), list(kinds.items()))
    columns = (*places.T, *colours.T, values)
    for name, column in zip(kinds, columns, strict=True):
        rows[name] = column
    header = ["ply", "format binary_little_endian 1.0", f"comment colour and quality: {measure}"]
    header += [f"element vertex {len(rows)}"]
    header += [f"property {'float' if k == '<f4' else 'uchar'} {n}" for n, k in kinds.items()]
    content = "\n".join([*header, "end_header", ""]).encode("ascii", "replace") + rows.tobytes()
    write_atomically(Path(path), lambda file: file.write_bytes(content))


def _on_scale(name: str, values: Any) -> tuple[Any, dict[float, float]]:
    """Colours [N] in [0, 1] of values, and the values that belong to five of them."""
    largest = max(float(values.max()), 1e-9) if len(values) else 1.0
    power = 0.5 if name in _ROOTED else 1.0
    ticks = {share: largest * share ** (1 / power) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    return np.clip(values / largest, 0.0, 1.0) ** power, ticks


def _frame(places: Any) -> tuple[list[list[float]], float]:
    """Ranges of the axes that no point lies at the end of, and how far off the camera sees all.

    The distance is in units of plotly's aspect mode "data": the cube root of the ranges' product.
    """
    low, high = places.min(axis=0), places.max(axis=0)
    middle, extent = (low + high) / 2, high - low
    half = 0.52 * np.maximum(extent, 0.05 * extent.max() or 1.0)
    radius = float(np.linalg.norm(places - middle, axis=1).max()) or 1.0
    unit = float(np.prod(2 * half)) ** (1 / 3)
    distance = _EDGE * radius / unit / math.sin(math.radians(_FIELD / 2))
    return [[float(m - h), float(m + h)] for m, h in zip(middle, half, strict=True)], distance


def _turned(points: Tensor, up: int) -> Any:
    """Coordinates [N, 3], turned so that ``up`` comes last."""
    return points[:, [(up + 1) % 3, (up + 2) % 3, up]].cpu().double().numpy()


def _checked(points: Tensor, scores: Tensor, up: int) -> tuple[Any, Any]:
    """Coordinates [N, 3], turned so that ``up`` comes last, and values [N]."""
    if points.ndim != 2 or points.shape[1] < 3 or scores.shape != points.shape[:1]:
        raise ShapeError(
            f"points must be [N, 3] and scores [N], got {tuple(points.shape)} and "
            f"{tuple(scores.shape)}."
        )
    return _turned(points, up), scores.cpu().double().numpy()
