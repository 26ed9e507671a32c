"""The page of a scored cloud says what it shows, in the coordinates of the file."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmd_plugin.errors import ShapeError
from cmd_plugin.pointcloud.plots import write_view

pytest.importorskip("plotly")


def figure_in(page: str) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Traces and layout of the last figure that a page draws."""
    start = page.rindex("Plotly.newPlot(")
    decoder, values, at = json.JSONDecoder(), [], page.index("[", start)
    for _ in range(2):
        value, end = decoder.raw_decode(page, at)
        values.append(value)
        at = end + re.match(r"[,\s]*", page[end:]).end()  # type: ignore[union-attr]
    return values[0], values[1]


def numbers(packed: object) -> np.ndarray:
    """An array, which plotly writes as base64."""
    assert isinstance(packed, dict)
    array = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])
    shape = [int(n) for n in packed.get("shape", str(len(array))).split(",")]
    return array.reshape(shape)


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_page_names_points_as_they_are_and_turns_them_up(up: int, tmp_path: Path) -> None:
    points = torch.rand(30, 4, dtype=torch.float64)
    scores = {"fbi": torch.arange(30.0), "critical++": torch.zeros(30)}
    write_view(tmp_path / "v.html", points, scores, "chair <b> & (99 %)", up=up)
    page = (tmp_path / "v.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>chair &lt;b&gt; &amp; (99 %)</title>" in page
    assert "margin: 0" in page
    assert 'src="http' not in page  # self-contained
    traces, layout = figure_in(page)
    assert [trace["visible"] for trace in traces] == [True, False]
    shown = numbers(traces[0]["customdata"])
    assert np.array_equal(shown[:, 0], np.arange(30))
    assert np.array_equal(shown[:, 1], scores["fbi"].numpy())
    assert np.array_equal(shown[:, 2:], points[:, :3].numpy())
    assert np.array_equal(numbers(traces[0]["z"]), points[:, up].numpy())
    colours = numbers(traces[0]["marker"]["color"])  # type: ignore[index]
    assert (colours.min(), colours.max()) == (0.0, 1.0)
    assert layout["scene"]["aspectmode"] == "data"  # type: ignore[index]
    assert layout["scene"]["camera"]["eye"]["z"] > 0  # type: ignore[index]
    assert layout["title"]["text"] == "chair &lt;b&gt; &amp; (99 %)"  # type: ignore[index]


def test_the_same_cloud_gives_the_same_page(tmp_path: Path) -> None:
    points, scores = torch.rand(30, 3), {"fbi": torch.rand(30)}
    for name in ("a", "b"):
        write_view(tmp_path / f"{name}.html", points, scores, "chair")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_scores_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="scores"):
        write_view(tmp_path / "v.html", torch.rand(30, 3), {"fbi": torch.zeros(29)})
    assert not (tmp_path / "v.html").exists()


def test_a_picture_needs_no_pyplot_and_shows_every_score() -> None:
    code = """
import sys, torch
from cmd_plugin.pointcloud.plots import plot_views
figure = plot_views(torch.rand(5, 3), {"fbi": torch.rand(5), "critical++": torch.rand(5)}, "mug")
print("matplotlib.pyplot" in sys.modules, [axes.get_title() for axes in figure.axes])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False ['fbi', 'critical++', '']"
