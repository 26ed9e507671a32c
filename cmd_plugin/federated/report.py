"""The picture of a federated run: accuracy against bytes, and bytes against rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cmd_plugin.training.folder import write_atomically

__all__ = ["draw_report", "write_report"]

_BLUE, _ORANGE, _GREY, _GREEN = "#0072B2", "#D55E00", "#7f7f7f", "#009E73"  # Okabe and Ito


def write_report(path: Path, summary: dict[str, Any]) -> None:
    """Draw a run into a PNG file; see :func:`draw_report`."""
    figure = draw_report(summary)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_report(summary: dict[str, Any]) -> Figure:
    """Return the two panels as a figure; nothing global is touched.

    Args:
        summary: The content of result.json.
    """
    rounds = summary["rounds"]
    number = np.array([r["round"] for r in rounds])
    accuracy = 100.0 * np.array([r["accuracy"] for r in rounds])
    up, down, plain = (
        np.array([r[name] for r in rounds]) / 1e6
        for name in ("bytes_up", "bytes_down", "fedavg_bytes")
    )
    config = summary["config"]
    name = config["method"].upper()
    with mpl.rc_context({"font.size": 10.0, "axes.titlesize": 11.0, "axes.titleweight": "bold"}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(12.0, 4.8), layout=layout)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        sent = np.cumsum(up + down)
        if config["method"] != "fedavg":
            left.plot(
                np.cumsum(plain), accuracy, ":", color=_GREY, label="same rounds, sent as FedAvg"
            )
        left.plot(sent, accuracy, color=_ORANGE, linewidth=2.0, label=name)
        left.set_xlabel("megabytes sent so far, up and down, all clients")
        left.set_ylabel("held-out accuracy, %")
        left.set_title("Accuracy against bytes")
        left.set_xlim(left=0.0)
        left.legend(frameon=False, loc="lower right")

        right.plot(number[1:], plain[1:], ":", color=_GREY, label="FedAvg, up + down")
        right.plot(number[1:], down[1:], color=_BLUE, linewidth=2.0, label="down")
        right.plot(number[1:], up[1:], "--", color=_ORANGE, linewidth=2.0, label="up")
        right.set_xlabel("round")
        right.set_ylabel("megabytes a round")
        right.set_title("Bytes against rounds")
        right.set_ylim(bottom=0.0)
        embedded = np.array([r["embedded_fraction"] for r in rounds])
        handles, labels = right.get_legend_handles_labels()
        if embedded.any():
            share = right.twinx()
            (line,) = share.plot(
                number, 100.0 * embedded, "-.", color=_GREEN, label="not sent, % of weights"
            )
            share.set_ylim(0.0, 105.0)
            share.set_ylabel("weights not sent, %")
            share.spines[["top"]].set_visible(False)
            handles, labels = [*handles, line], [*labels, "weights not sent, %"]
        # Below: curves cross every part of the panel in some run or other.
        right.legend(
            handles,
            labels,
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=len(labels),
        )
        for axes in (left, right):
            axes.spines[["top"]].set_visible(False)
        left.spines[["right"]].set_visible(False)
        figure.suptitle(_headline(summary), fontsize=12.5)
    return figure


def _headline(summary: dict[str, Any]) -> str:
    config, data = summary["config"], summary["data"]
    return (
        f"{config['model']} on {data['name']}, {config['clients']} clients, "
        f"{config['partition']}, {config['rounds']} rounds of {config['method']}: "
        f"{summary['accuracy']:.1%} with {summary['bytes_of_fedavg']:.1%} of FedAvg's bytes"
    )
