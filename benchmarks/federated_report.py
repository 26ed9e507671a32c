"""Tables and picture of :mod:`benchmarks.federated`: what each method's bytes buy."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

LAST = 5  # rounds whose mean is the accuracy of a run
TOLERANCE = 0.005  # of accuracy: what counts as reaching that of FedAvg
RIVALS = ("APF", "A-APF", "EDEN 2 bit", "EDEN 1 bit")
"""Whose accuracy with as many bytes stands beside that of CMD."""
COLORS = {
    "FedAvg": "#7f7f7f",
    "APF": "#0072B2",
    "A-APF": "#56B4E9",
    "top-k 10 %": "#009E73",
    "FedPAQ 8 bit": "#CC79A7",
    "EDEN 2 bit": "#000000",
    "EDEN 1 bit": "#000000",
    "low-rank adapters": "#8c564b",
    "CMD, paper": "#E69F00",
    "CMD, paper, tie": "#999933",
    "CMD absolute": "#882255",
    "CMD relative": "#D55E00",
}
STYLES = {"8 bit": "--", "2 bit": "-.", "1 bit": ":"}


def share(row: dict[str, Any]) -> float:
    """Bytes of a run over those of FedAvg in the same rounds."""
    return float((row["bytes_up"] + row["bytes_down"]) / row["fedavg_bytes"])


def smoothed(row: dict[str, Any]) -> np.ndarray:
    """Accuracy of each round, averaged over the last five up to it."""
    accuracy = np.array([point[0] for point in row["curve"]])
    return np.array([accuracy[max(0, n - LAST + 1) : n + 1].mean() for n in range(len(accuracy))])


def bytes_to_reach(row: dict[str, Any], target: float) -> float | None:
    """Bytes until the smoothed accuracy first reaches a target, over FedAvg's bytes of a run."""
    sent = np.cumsum([point[1] for point in row["curve"]])
    reached = np.flatnonzero(smoothed(row) >= target)
    return float(sent[reached[0]] / row["fedavg_bytes"]) if len(reached) else None


def accuracy_at(row: dict[str, Any], sent: float) -> float:
    """Return the smoothed accuracy of a run when it had sent that many bytes, or at its end."""
    total = np.cumsum([point[1] for point in row["curve"]])
    return float(smoothed(row)[np.flatnonzero(total <= sent)[-1]])


def table(title: str, groups: dict[str, list[dict[str, Any]]]) -> Table:
    """One problem: a row for each method, mean and spread over seeds."""
    shown = Table(title=title, title_justify="left")
    for name in ("method", "accuracy %", "against FedAvg", "bytes of FedAvg", "up", "down"):
        shown.add_column(name, justify="left" if name == "method" else "right")
    shown.add_column("bytes to FedAvg's accuracy", justify="right")
    rivals = [name for name in RIVALS if name in groups]
    shown.add_column(f"{', '.join(rivals)} with as many bytes", justify="right")
    reference = {row["seed"]: row for row in groups["FedAvg"]}
    for method, rows in groups.items():
        accuracy = [100 * row["accuracy"] for row in rows]
        gap = [100 * (r["accuracy"] - reference[r["seed"]]["accuracy"]) for r in rows]
        spread = f" ± {stdev(accuracy):.2f}" if len(rows) > 1 else ""
        target = {s: r["accuracy"] - TOLERANCE for s, r in reference.items()}
        needed = [bytes_to_reach(row, target[row["seed"]]) for row in rows]
        reached = [value for value in needed if value is not None]
        until = f"{mean(reached):.1%}" if len(reached) == len(rows) else "not reached"
        if 0 < len(reached) < len(rows):
            until = f"{mean(reached):.1%} ({len(reached)} of {len(rows)} seeds)"
        others = [
            mean(
                100 * accuracy_at(other, row["bytes_up"] + row["bytes_down"])
                for row, other in zip(rows, groups[name], strict=True)
            )
            for name in rivals
        ]
        shown.add_row(
            method,
            f"{mean(accuracy):.2f}{spread}",
            f"{mean(gap):+.2f}",
            f"{mean(share(row) for row in rows):.1%}",
            f"{mean(row['bytes_up'] for row in rows) / 1e6:.2f} MB",
            f"{mean(row['bytes_down'] for row in rows) / 1e6:.2f} MB",
            until,
            ", ".join(f"{value:.2f}" for value in others) if method.startswith("CMD") else "",
        )
    return shown


def draw(path: Path, problems: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Draw accuracy against bytes, a panel for each problem."""
    with mpl.rc_context({"font.size": 9.0, "axes.titlesize": 10.0, "axes.titleweight": "bold"}):
        columns = min(2, len(problems))
        figure = Figure(figsize=(6.2 * columns, 4.2 * -(-len(problems) // columns) + 1.0))
        figure.set_layout_engine("constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(-(-len(problems) // columns), columns, squeeze=False)
        for axes, (title, groups) in zip(panels.flat, problems.items(), strict=False):
            for method, rows in groups.items():
                curves = np.mean([smoothed(row) for row in rows], axis=0)
                sent = np.mean(
                    [np.cumsum([p[1] for p in r["curve"]]) / r["fedavg_bytes"] for r in rows],
                    axis=0,
                )
                axes.plot(
                    100 * sent,
                    100 * curves,
                    next((style for bits, style in STYLES.items() if bits in method), "-"),
                    color=COLORS.get(method) or COLORS[method.rsplit(",", 1)[0]],
                    linewidth=2.2 if method.startswith("CMD") else 1.3,
                    label=method,
                )
            axes.set_title(title)
            axes.set_xscale("log")
            axes.set_xlim(1.0, 105.0)
            axes.set_xlabel("bytes so far, % of what FedAvg sends in the run (log)")
            axes.set_ylabel("held-out accuracy, %, mean of 5 rounds")
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels.flat[len(problems) :]:
            axes.set_visible(False)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
