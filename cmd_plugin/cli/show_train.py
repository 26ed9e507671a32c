"""What `cmd-plugin train` prints when it has finished."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show"]


def show(result: Result) -> None:
    """Print the table of a comparison and its costs."""
    metrics, seconds = result.metrics, result.seconds
    console = Console(highlight=False)
    console.print(_table(result))
    explained = metrics["explained_variance"]
    share = "an unknown part" if explained is None else f"{explained:.1%}"
    console.print(
        f"CMD: {metrics['modes']} modes for {metrics['parameters']:,} weights, {share} of their "
        "movement explained"
    )
    console.print(
        f"overhead: {metrics['overhead_percent']:.1f} % of the training time "
        f"({seconds['cmd']:.1f} s of {seconds['training']:.0f} s)"
    )
    console.print(
        f"state: {metrics['state_bytes_per_parameter']:.1f} bytes per parameter (during warm-up up "
        f"to {metrics['peak_state_bytes_per_parameter']:.1f})"
    )
    if "embedded" in metrics:
        _show_embedded(console, metrics["embedded"])


def _show_embedded(console: Console, embedded: dict[str, Any]) -> None:
    mean = embedded["saved_percent"]
    console.print(
        f"embedded: {embedded['embedded_fraction']:.1%} of the weights at the end, "
        f"{mean:.1f} % on average over the run"
    )
    sent, full = embedded["volume_bytes"], embedded["full_bytes"]
    console.print(
        f"sent after every epoch, the weights are {sent / 1e6:.1f} MB instead of "
        f"{full / 1e6:.1f} MB ({sent / full:.1%})"
    )


def _table(result: Result) -> Table:
    options, metrics = result.options, result.metrics
    seeds = options["seeds"]
    spread = f", mean ± std over {seeds} seeds" if seeds > 1 else ", 1 seed"
    alike = "as trained" in metrics["accuracy"]
    table = Table(
        title=f"{options['model']} on {result.data['name']} after {options['epochs']} epochs"
        f"{spread}",
        caption="BatchNorm statistics re-estimated on the same training batches in every row but "
        "'as trained'."
        if alike
        else None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("weights")
    table.add_column("accuracy (%)", justify="right")
    table.add_column("loss", justify="right")
    names = {
        "as trained": "raw, statistics as trained",
        "raw": "raw",
        "ema": f"EMA ({options['ema_decay']:g} a step)",
        "swa": "SWA (last quarter)",
        "cmd": f"CMD ({metrics['modes']} modes)",
        "embedded": f"embedded ({options['embed_project']}), own training",
    }
    for name, shown in names.items():
        if name in metrics["accuracy"]:
            table.add_row(
                shown,
                _cell(metrics["accuracy"][name], metrics["accuracy_std"][name], 100.0, 2),
                _cell(metrics["loss"][name], metrics["loss_std"][name], 1.0, 4),
            )
    return table


def _cell(mean: float | None, std: float | None, factor: float, digits: int) -> str:
    if mean is None:
        return "not finite"
    if std is None:
        return f"{factor * mean:.{digits}f}"
    return f"{factor * mean:.{digits}f} ± {factor * std:.{digits}f}"
