"""The picture of a comparison: accuracy, mode profiles, correlation matrix, modes by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cmd_plugin.jobs.compare.files import Row
from cmd_plugin.jobs.compare.options import TrainOptions
from cmd_plugin.modes import Decomposition
from cmd_plugin.modes.plots import plot_correlation, plot_mode_share, plot_profiles
from cmd_plugin.runs.figures import PALETTE, figure_style, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_report", "plot_accuracy"]

# Line styles say again what colours say.
_STYLES: dict[str, dict[str, Any]] = {
    "as trained": {
        "label": "raw, statistics as trained",
        "color": "#b5b5b5",
        "linestyle": (0, (1, 2)),
        "linewidth": 1.4,
    },
    "raw": {"label": "raw", "color": "#444444", "linestyle": ":", "linewidth": 1.8},
    "ema": {"label": "EMA", "color": PALETTE[0], "linestyle": "--", "linewidth": 1.6},
    "swa": {"label": "SWA", "color": PALETTE[2], "linestyle": "-.", "linewidth": 1.8},
    "cmd": {"label": "CMD", "color": PALETTE[3], "linestyle": "-", "linewidth": 2.2},
    "embedded": {"label": "embedded", "color": PALETTE[4], "linestyle": "-", "linewidth": 1.8},
}


def draw_report(
    rows: Mapping[str, Sequence[Row]],
    decomposition: Decomposition,
    correlation: tuple[Tensor, Tensor] | None,
    options: TrainOptions,
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Figure:
    """Return the four panels as a figure; nothing global is touched.

    Args:
        rows: Scores of all seeds, epochs and variants, by the kind of training.
        decomposition: Modes of the first seed.
        correlation: Absolute correlation [K, K] of the clustered weights, and their modes [K].
        options: The comparison's options.
        data: What it ran on.
        metrics: What it found.
    """
    shown = list(rows["online"])
    shown += [
        r._replace(variant="embedded") for r in rows.get("embedded", ()) if r.variant == "raw"
    ]
    seed = f", seed {options.seed}" if options.seeds > 1 else ""
    with figure_style():
        figure = new_figure(13.0, 10.0)
        # Two rows of their own: long layer names below must not squeeze the panels above.
        rows_of_panels: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
        accuracy, profiles = rows_of_panels[0].subplots(1, 2)
        matrix, layers = rows_of_panels[1].subplots(1, 2)
        plot_accuracy(shown, options.warmup, accuracy)
        plot_profiles(decomposition, profiles)
        profiles.set_title(f"Mode profiles{seed} (share of weights)")
        if correlation is None:
            matrix.text(0.5, 0.5, "correlations were not kept", ha="center", va="center")
            matrix.set_axis_off()
        else:
            plot_correlation(*correlation, matrix)
            count = len(correlation[1])
            matrix.set_title(f"Clustered correlations{seed} ({count} sampled weights)")
        plot_mode_share(decomposition, layers)
        layers.set_title(f"Modes in each layer{seed}")
        legend = layers.get_legend()
        if legend is not None:  # the profiles' legend says the same
            legend.remove()
        layers.set_xlabel("share of weights (colours as above)")
        figure.suptitle(_headline(options, data, metrics))
    return figure


def _headline(options: TrainOptions, data: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    noise = f" with {options.label_noise:.0%} label noise" if options.label_noise else ""
    seeds = f"{options.seeds} seeds" if options.seeds > 1 else "1 seed"
    explained = metrics["explained_variance"]
    share = "an unknown part" if explained is None else f"{explained:.1%}"
    return (
        f"{options.model} on {data['name']}{noise}, {seeds}: {metrics['modes']} modes explain "
        f"{share} of the movement of {metrics['parameters']:,} weights"
    )


def plot_accuracy(rows: Sequence[Row], warmup: int, axes: Axes) -> None:
    """Draw the held-out accuracy of each variant over the epochs, mean and spread over seeds.

    The vertical range shows all that happens once CMD has started, and of the slow EMA the last
    quarter; where a curve begins below, the axis says so.

    Args:
        rows: Scores of all seeds, epochs and variants.
        warmup: Epoch after which CMD starts.
        axes: Where to draw.
    """
    from matplotlib.ticker import MaxNLocator

    seeds = sorted({row.seed for row in rows})
    last = max(row.epoch for row in rows)
    lowest, highest, deepest = 100.0, 0.0, 100.0
    for variant, style in _STYLES.items():
        mine = [row for row in rows if row.variant == variant]
        epochs = np.array(sorted({row.epoch for row in mine}))
        if not len(epochs):
            continue
        table = np.full((len(seeds), len(epochs)), np.nan)
        for row in mine:
            column = int(np.searchsorted(epochs, row.epoch))
            table[seeds.index(row.seed), column] = 100.0 * row.accuracy
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
        deepest = min(deepest, *low)
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
    several = any(row.variant == "embedded" for row in rows)
    runs = "two trainings a seed" if several else "the same training runs"
    spread_note = " (mean ± std over seeds)" if len(seeds) > 1 else ""
    cut = f"; curves from {deepest:.0f} % on are cut off" if deepest < bottom else ""
    axes.set(
        xlabel="epoch",
        ylabel=f"held-out accuracy (%){cut}",
        title=f"Accuracy in {runs}{spread_note}",
    )
    legend_below(axes)
