"""The picture of a federated run: accuracy against bytes, and bytes against rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cmd_plugin.jobs.federated.options import SimulateOptions
from cmd_plugin.runs.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    figure_style,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_report"]


def draw_report(
    options: SimulateOptions, metrics: Mapping[str, Any], data: Mapping[str, Any]
) -> Figure:
    """Return the two panels as a figure; nothing global is touched.

    Args:
        options: The options of the run.
        metrics: What it found, as in result.json.
        data: What it was found on, as in result.json.
    """
    rounds = metrics["rounds"]
    number, accuracy, up, down, plain_up, plain_down, embedded = (
        np.array([r[name] for r in rounds])
        for name in (
            "round",
            "accuracy",
            "bytes_up",
            "bytes_down",
            "fedavg_bytes_up",
            "fedavg_bytes_down",
            "embedded_fraction",
        )
    )
    up, down, plain_up, plain_down = (x / 1e6 for x in (up, down, plain_up, plain_down))
    with figure_style():
        figure = new_figure(12.0, 4.8)
        left, right = figure.subplots(1, 2)
        if options.method != "fedavg":
            left.plot(
                np.cumsum(plain_up + plain_down),
                100.0 * accuracy,
                ":",
                color=GREY,
                label="same rounds, sent as FedAvg",
            )
        left.plot(
            np.cumsum(up + down),
            100.0 * accuracy,
            color=ORANGE,
            linewidth=2.0,
            label=options.method.upper(),
        )
        left.set_xlabel("megabytes sent so far, up and down, all clients")
        left.set_ylabel("held-out accuracy, %")
        left.set_title("Accuracy against bytes")
        left.set_xlim(left=0.0)
        legend_below(left)

        if options.method != "fedavg":  # the two are nearly equal: dashes on a wider line
            right.plot(
                number[1:],
                plain_down[1:],
                color=GREY,
                alpha=0.4,
                linewidth=4.0,
                label="down, sent as FedAvg",
            )
            right.plot(
                number[1:],
                plain_up[1:],
                "--",
                color=GREY,
                linewidth=1.5,
                label="up, sent as FedAvg",
            )
        right.plot(number[1:], down[1:], color=BLUE, linewidth=2.0, label="down")
        right.plot(number[1:], up[1:], "--", color=ORANGE, linewidth=2.0, label="up")
        right.set_xlabel("round")
        right.set_ylabel("megabytes a round")
        right.set_title("Bytes against rounds")
        right.set_ylim(bottom=0.0)
        handles, labels = right.get_legend_handles_labels()
        if embedded.any():
            share = right.twinx()
            (line,) = share.plot(number, 100.0 * embedded, "-.", color=GREEN)
            share.set_ylim(0.0, 105.0)
            share.set_ylabel("weights not sent, %")
            share.spines[["right"]].set_visible(True)
            handles, labels = [*handles, line], [*labels, "weights not sent, %"]
        legend_below(right, 3, handles=handles, labels=labels)
        figure.suptitle(
            f"{options.model} on {data['name']}, {options.clients} clients, {options.partition}, "
            f"{options.rounds} rounds of {options.method}: {metrics['accuracy']:.1%} with "
            f"{metrics['bytes_of_fedavg']:.1%} of FedAvg's bytes"
        )
    return figure
