"""Pictures of a robustness report: accuracy against level, mCE, and how members err together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, LEVELS
from cmd_plugin.pointcloud.diversity import Diversity
from cmd_plugin.pointcloud.robustness import RobustnessReport
from cmd_plugin.runs.figures import SEQUENTIAL, colour, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_report", "plot_error_correlation", "plot_levels", "plot_mean_errors"]


def draw_report(report: RobustnessReport, title: str) -> Figure:
    """Return a figure of all panels: seven corruptions, mCE, and the members of the last ensemble.

    Args:
        report: What to show.
        title: What was evaluated: network, data, seeds.
    """
    with figure_style():
        figure = new_figure(16, 9.5)
        grid = figure.add_gridspec(3, 4)
        places = [figure.add_subplot(grid[place // 4, place % 4]) for place in range(7)]
        for corruption, axes in zip(CORRUPTIONS, places, strict=True):
            plot_levels(report, corruption, axes)
        handles, labels = places[0].get_legend_handles_labels()
        key = figure.add_subplot(grid[1, 3])
        key.axis("off")
        key.legend(handles, labels, loc="center", frameon=False, fontsize=11)
        plot_mean_errors(report, figure.add_subplot(grid[2, :2]))
        if report.diversity:
            row = list(report.diversity)[-1]
            found = report.diversity[row]["all"]
            plot_error_correlation(found, figure.add_subplot(grid[2, 2:]), row)
        figure.suptitle(title)
    return figure


def plot_levels(report: RobustnessReport, corruption: str, axes: Axes) -> None:
    """Plot accuracy against level, from clean on, one line per row of the table."""
    for number, (name, table) in enumerate(report.accuracy.items()):
        values = [*table["clean"], *table[corruption]]
        axes.plot(values, marker="o", ms=3, color=colour(number), label=name)
    axes.set_xticks(range(LEVELS + 1), ["clean", *map(str, range(LEVELS))])
    axes.set_ylim(0.0, 1.02)
    axes.set_title(corruption.replace("_", " "))
    axes.set_xlabel("level")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)


def plot_mean_errors(report: RobustnessReport, axes: Axes) -> None:
    """Plot mCE of every row as bars; the reference DGCNN on ModelNet-C has 1."""
    names = list(report.summaries)
    values = [report.summaries[name].mce for name in names]
    bars = axes.barh(names, values, color=[colour(number) for number in range(len(names))])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_xlim(0, 1.15 * max(values) or 1.0)
    axes.invert_yaxis()
    axes.set_xlabel("mCE (lower is better)")


def plot_error_correlation(found: Diversity, axes: Axes, title: str = "") -> None:
    """Plot the correlation of members' errors as a matrix; blank where it is not defined."""
    image = axes.imshow(found.error_correlation.numpy(), vmin=0.0, vmax=1.0, cmap=SEQUENTIAL)
    places = range(len(found.views))
    axes.set_xticks(places, found.views, rotation=90, fontsize=8)
    axes.set_yticks(places, found.views, fontsize=8)
    axes.set_title("\n".join(filter(None, ("correlation of errors, all sets", title))))
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
