"""Pictures need no window, and change nothing for anybody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl

from cmd_plugin.runs.figures import (
    PALETTE,
    axes_or_new,
    colour,
    figure_style,
    legend_below,
    new_figure,
    png_bytes,
    save_figure,
    write_page,
)


def test_a_figure_is_drawn_in_our_style_and_nothing_global_changes(tmp_path: Path) -> None:
    before = mpl.rcParams["axes.titleweight"]
    with figure_style():
        figure = new_figure(4, 3)
        axes = figure.subplots()
        assert not axes.spines["top"].get_visible()
    assert mpl.rcParams["axes.titleweight"] == before
    axes.plot([0, 1], label="a")
    legend_below(axes)
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert axes_or_new(axes) == (figure, axes)


def test_colours_repeat_after_the_palette() -> None:
    assert colour(len(PALETTE)) == PALETTE[0]


def test_a_page_stands_alone_and_escapes_its_title(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "a < b", ["<p>text</p>", png_bytes(new_figure(1, 1))])
    page = (tmp_path / "page.html").read_text()
    assert "<title>a &lt; b</title>" in page
    assert "data:image/png;base64," in page
    assert "http" not in page


def test_pictures_do_without_pyplot() -> None:
    code = (
        "import sys; from cmd_plugin.runs.figures import axes_or_new, png_bytes\n"
        "figure, _ = axes_or_new(None); png_bytes(figure)\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
