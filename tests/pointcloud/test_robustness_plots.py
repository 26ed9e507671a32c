"""The picture of a robustness report shows its numbers, and nothing runs off the page."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.pointcloud import CORRUPTIONS, Diversity, RobustnessReport, mean_corruption_error
from cmd_plugin.pointcloud.robustness_plots import draw_report
from cmd_plugin.runs.figures import colour

ROWS = ("plain", "refocused, trained", "EPiC + refocused")


def report() -> RobustnessReport:
    accuracy = {
        name: {"clean": [0.9], **{c: [0.8 - 0.1 * row] * 5 for c in CORRUPTIONS}}
        for row, name in enumerate(ROWS)
    }
    summaries = {
        name: mean_corruption_error({c: table[c] for c in CORRUPTIONS}, 0.9)
        for name, table in accuracy.items()
    }
    views = ("patch", "curve", "refocused")
    square = torch.eye(3, dtype=torch.float64)
    found = Diversity(views, torch.ones(3), 0.9, square, square, square, square, 0.1, 0.05)
    return RobustnessReport(summaries, accuracy, {"EPiC + refocused": {"all": found}}, 12, 0)


def test_every_panel_shows_the_numbers_of_the_report() -> None:
    made = report()
    figure = draw_report(made, "PointNet on shapes, seed 0")
    figure.draw_without_rendering()
    panels = {axes.get_title(): axes for axes in figure.axes}
    for corruption in CORRUPTIONS:
        lines = panels[corruption.replace("_", " ")].get_lines()
        assert [line.get_label() for line in lines] == list(ROWS)
        assert [line.get_color() for line in lines] == [colour(number) for number in range(3)]
        for line, name in zip(lines, ROWS, strict=True):
            assert list(line.get_ydata()) == [0.9, *made.accuracy[name][corruption]]
    bars = next(axes for axes in figure.axes if axes.containers)
    widths = [bar.get_width() for bar in bars.containers[0]]  # type: ignore[union-attr]
    assert widths == pytest.approx([made.summaries[name].mce for name in ROWS])
    matrix = panels["correlation of errors, all sets\nEPiC + refocused"].get_images()[0]
    assert matrix.get_array().tolist() == torch.eye(3).tolist()  # type: ignore[union-attr]
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, axes.get_title()  # noqa: PT018
