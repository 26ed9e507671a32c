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
from cmd_plugin.pointcloud.files import load_cloud
from cmd_plugin.pointcloud.plots import write_ply, write_view

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


@pytest.mark.parametrize("size", [(1, 1, 1), (9, 0.1, 3), (1, 0, 0)])
def test_the_page_shows_every_point_however_it_is_turned(
    size: tuple[float, float, float], tmp_path: Path
) -> None:
    points = (torch.rand(200, 3, dtype=torch.float64) - 0.5) * torch.tensor(size)
    write_view(tmp_path / "v.html", points, {"fbi": torch.rand(200)})
    _, layout = figure_in((tmp_path / "v.html").read_text(encoding="utf-8"))
    scene: dict[str, dict[str, dict[str, float]]] = layout["scene"]  # type: ignore[assignment]
    ranges = np.array([scene[f"{axis}axis"]["range"] for axis in "xyz"])
    places = points.numpy()
    assert (places > ranges[:, 0]).all()
    assert (places < ranges[:, 1]).all()
    # In plotly's units, a range is as long as it is, over the cube root of all three's product.
    unit = float(np.prod(ranges[:, 1] - ranges[:, 0])) ** (1 / 3)
    furthest = np.linalg.norm((places - ranges.mean(axis=1)) / unit, axis=1).max()
    eye = np.linalg.norm([scene["camera"]["eye"][axis] for axis in "xyz"])
    assert furthest / eye < np.sin(np.radians(45 / 2))  # of a sphere, half the field of view


def test_counts_are_coloured_by_their_square_roots_and_named(tmp_path: Path) -> None:
    counts = torch.tensor([0.0, 1.0, 25.0, 100.0])
    write_view(tmp_path / "v.html", torch.rand(4, 3), {"critical++": counts, "fbi": counts})
    traces, _ = figure_in((tmp_path / "v.html").read_text(encoding="utf-8"))
    expected = (([0, 0.1, 0.5, 1], "critical++<br>square root"), ([0, 0.01, 0.25, 1], "fbi"))
    for trace, (shares, title) in zip(traces, expected, strict=True):
        marker: dict[str, dict[str, object]] = trace["marker"]  # type: ignore[assignment]
        np.testing.assert_allclose(numbers(marker["color"]), shares, atol=1e-7)
        assert marker["colorbar"]["title"] == {"text": title}
    bar: dict[str, object] = traces[0]["marker"]["colorbar"]  # type: ignore[index]
    assert dict(zip(bar["tickvals"], bar["ticktext"], strict=True))[0.5] == "25"  # type: ignore[call-overload]


def test_a_coloured_cloud_is_read_by_others_as_it_was_written(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    import matplotlib as mpl

    points, scores = torch.rand(9, 3), torch.arange(9.0)
    for measure, shares in (("fbi", scores / 8), ("critical++", (scores / 8).sqrt())):
        write_ply(tmp_path / "v.ply", points, scores, measure)
        found = trimesh.load(tmp_path / "v.ply")
        np.testing.assert_array_equal(found.vertices, points.double().numpy())
        expected = mpl.colormaps["viridis"](shares.double().numpy(), bytes=True)
        np.testing.assert_array_equal(found.colors, expected)
        assert torch.equal(load_cloud(tmp_path / "v.ply"), points)
        assert b"property float quality\n" in (tmp_path / "v.ply").read_bytes()
