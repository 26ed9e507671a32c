"""How our pictures look: one palette, one frame, files without a window, one kind of page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PALETTE",
    "SEQUENTIAL",
    "axes_or_new",
    "colour",
    "figure_style",
    "legend_below",
    "new_figure",
    "png_bytes",
    "read_about",
    "save_figure",
    "write_page",
]

# Okabe and Ito's palette, told apart by all common kinds of colour vision, then a grey and two
# tints for series beyond.
PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#444444",
    "#8C6BB1",
    "#A6761D",
)
BLUE, GREEN, ORANGE, GREY = PALETTE[0], PALETTE[2], PALETTE[3], "#7f7f7f"

SEQUENTIAL = "viridis"
"""Colour map of values from small to large."""

_STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 12.5,
}
_DPI = 150
_ABOUT = "Comment"


def colour(number: int) -> str:
    """Return the colour of series ``number``; they repeat after ten."""
    return PALETTE[number % len(PALETTE)]


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in our style inside the block; nothing global is left changed."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that can be saved anywhere: no window, no pyplot.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def axes_or_new(axes: Axes | None) -> tuple[Figure | SubFigure, Axes]:
    """Return the axes given and their figure, or those of a new figure."""
    if axes is not None:
        return axes.figure, axes
    figure = new_figure(6.4, 4.8)
    return figure, figure.subplots()


def legend_below(axes: Axes, columns: int | None = None, **options: Any) -> None:
    """Put the legend under the axes, where no curve can cross it; nothing without labels."""
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = options.pop("handles", handles), options.pop("labels", labels)
    if labels:
        axes.legend(
            handles,
            labels,
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=columns or min(len(labels), 5),
            **options,
        )


def save_figure(figure: Figure, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a figure as PNG, in one step.

    Args:
        figure: The figure.
        path: The file.
        about: JSON types that say what it shows, kept in the file's comment: see
            :func:`read_about`.

    Raises:
        InputError: If it cannot be written.
    """
    metadata = {"Software": "cmd-plugin"} | ({} if about is None else {_ABOUT: json.dumps(about)})
    write_atomically(
        Path(path), lambda file: figure.savefig(file, format="png", dpi=_DPI, metadata=metadata)
    )


def read_about(path: str | Path) -> dict[str, Any]:
    """Return what :func:`save_figure` was told about a picture; empty if nothing.

    Raises:
        InputError: If the file is no picture of ours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            content = json.loads(image.info.get(_ABOUT, "{}"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no picture of this program ({error}).") from error
    return dict(content)


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def write_page(
    path: str | Path, title: str, parts: Sequence[str | bytes], *, fill: bool = False
) -> None:
    """Write one HTML page that needs nothing but itself.

    Args:
        path: The file.
        title: Of the page; plain text.
        parts: Pieces of HTML as text, or PNG pictures as bytes.
        fill: Whether the one part fills the window, as an interactive view does.

    Raises:
        InputError: If it cannot be written.
    """
    body = "\n".join(
        part
        if isinstance(part, str)
        else f'<img alt="" src="data:image/png;base64,{base64.b64encode(part).decode()}">'
        for part in parts
    )
    style = (
        "body { margin: 0; overflow: hidden; }"
        if fill
        else "body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; "
        "font-family: sans-serif; } img { max-width: 100%; }"
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
    write_atomically(Path(path), lambda file: file.write_text(page, encoding="utf-8"))
