"""The picture of a comparison: accuracy, mode profiles, correlation matrix, modes by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file
from torch import Tensor

from cmd_plugin.modes import Decomposition
from cmd_plugin.modes.plots import plot_correlation, plot_mode_share, plot_profiles
from cmd_plugin.training.folder import Row, RunFolder, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_report", "plot_accuracy", "write_report"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles say it again.
_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"label": "raw", "color": "#7f7f7f", "linestyle": ":", "linewidth": 1.6},
    "ema": {"label": "EMA", "color": "#0072B2", "linestyle": "--", "linewidth": 1.6},
    "swa": {"label": "SWA", "color": "#009E73", "linestyle": "-.", "linewidth": 1.8},
    "cmd": {"label": "CMD", "color": "#D55E00", "linestyle": "-", "linewidth": 2.2},
    "embedded": {"label": "embedded", "color": "#CC79A7", "linestyle": "-", "linewidth": 1.8},
}


def write_report(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Draw report.png from the files of a finished comparison.

    Args:
        folder: Where metrics.csv, modes.safetensors and the correlation matrix lie.
        summary: The content of result.json.
    """
    decomposition = Decomposition.load(folder.modes)
    path = folder.correlation(summary["config"]["seed"])
    correlation = None
    if path.exists():
        tensors = load_file(path)
        correlation = tensors["correlation"].float(), tensors["labels"]
    rows = folder.rows()
    if "embedded" in summary:
        rows += [
            replace(row, variant="embedded")
            for row in folder.embedded.rows()
            if row.variant == "raw"
        ]
    figure = draw_report(rows, decomposition, correlation, summary)
    write_atomically(folder.report, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_report(
    rows: Sequence[Row],
    decomposition: Decomposition,
    correlation: tuple[Tensor, Tensor] | None,
    summary: dict[str, Any],
) -> Figure:
    """The four panels as a figure; nothing global is touched.

    Args:
        rows: Scores of all seeds, epochs and variants.
        decomposition: Modes of the first seed.
        correlation: Absolute correlation [K, K] of the clustered weights, and their modes [K].
        summary: The content of result.json.
    """
    with mpl.rc_context({"font.size": 10.0, "axes.titlesize": 11.0, "axes.titleweight": "bold"}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(13.0, 10.0), layout=layout)
        FigureCanvasAgg(figure)
        # Two rows of their own: long layer names below must not squeeze the panels above.
        rows_of_panels: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
        accuracy, profiles = rows_of_panels[0].subplots(1, 2)
        matrix, layers = rows_of_panels[1].subplots(1, 2)
        plot_accuracy(rows, summary["config"]["warmup"], accuracy)
        plot_profiles(decomposition, profiles)
        if correlation is None:
            matrix.text(0.5, 0.5, "correlations were not kept", ha="center", va="center")
            matrix.set_axis_off()
        else:
            plot_correlation(*correlation, matrix)
        plot_mode_share(decomposition, layers)
        legend = layers.get_legend()
        if legend is not None:  # the profiles' legend says the same
            legend.remove()
        layers.set_xlabel("share of weights (colours as above)")
        for axes in (accuracy, profiles, layers):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(_headline(summary), fontsize=12.5)
    return figure


def _headline(summary: dict[str, Any]) -> str:
    config, data = summary["config"], summary["data"]
    noise = f" with {config['label_noise']:.0%} label noise" if config["label_noise"] else ""
    seeds = f"{config['seeds']} seeds" if config["seeds"] > 1 else "1 seed"
    return (
        f"{config['model']} on {data['name']}{noise}, {seeds}: {summary['modes']} modes explain "
        f"{summary['explained_variance']:.1%} of the movement of {summary['parameters']:,} weights"
    )


def plot_accuracy(rows: Sequence[Row], warmup: int, axes: Axes) -> None:
    """Draw the held-out accuracy of each variant over the epochs, mean and spread over seeds.

    The vertical range shows all that happens once CMD has started, and of the slow EMA the last
    quarter; what lies below is cut off.

    Args:
        rows: Scores of all seeds, epochs and variants.
        warmup: Epoch after which CMD starts.
        axes: Where to draw.
    """
    seeds = sorted({row.seed for row in rows})
    last = max(row.epoch for row in rows)
    lowest, highest = 100.0, 0.0
    for variant, style in _STYLES.items():
        mine = [row for row in rows if row.variant == variant]
        epochs = np.array(sorted({row.epoch for row in mine}))
        if not len(epochs):
            continue
        table = np.full((len(seeds), len(epochs)), np.nan)
        for row in mine:
            column = int(np.searchsorted(epochs, row.epoch))
            table[seeds.index(row.seed), column] = 100.0 * row.score.accuracy
        mean = np.nanmean(table, axis=0)
        marker = "o" if len(epochs) == 1 else None  # a line needs two points
        axes.plot(epochs, mean, marker=marker, **style)
        low, high = mean, mean
        if len(seeds) > 1:
            spread = np.nanstd(table, axis=0, ddof=1)
            low, high = mean - spread, np.minimum(mean + spread, 100.0)
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
        seen = epochs >= (0.75 * last if variant == "ema" else warmup)
        lowest = min(lowest, *low[seen])
        highest = max(highest, *high[seen])
    margin = max(0.08 * (highest - lowest), 0.2)
    bottom = lowest - margin
    axes.set_ylim(bottom, min(highest + margin, 100.0 + 0.02 * (100.0 - bottom)))
    axes.set_xlim(0, 1.015 * last)
    axes.axvspan(0, warmup, color="black", alpha=0.045, linewidth=0)
    axes.text(
        warmup / 2,
        0.015,
        "CMD warm-up",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        color="0.35",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.5},
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="best", framealpha=0.9)
    several = any(row.variant == "embedded" for row in rows)
    runs = "two trainings a seed" if several else "the same training runs"
    spread_note = " (mean ± std over seeds)" if len(seeds) > 1 else ""
    axes.set(
        xlabel="epoch",
        ylabel="held-out accuracy (%)",
        title=f"Accuracy in {runs}{spread_note}",
    )
