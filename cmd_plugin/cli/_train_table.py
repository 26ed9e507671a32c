"""What `cmd-plugin train` prints when it has finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cmd_plugin.training import ComparisonResult

__all__ = ["print_comparison"]


def print_comparison(result: ComparisonResult) -> None:
    """Print the table of a comparison, its costs, and what was written.

    Args:
        result: The comparison.
    """
    summary = result.summary
    console = Console(highlight=False)
    console.print(_table(summary))
    seconds = summary["seconds"]
    bytes_now = summary["state_bytes_per_parameter"]
    bytes_peak = summary["peak_state_bytes_per_parameter"]
    console.print(
        f"CMD: {summary['modes']} modes for {summary['parameters']:,} weights, "
        f"{summary['explained_variance']:.1%} of their movement explained"
    )
    console.print(
        f"overhead: {summary['overhead_percent']:.1f} % of the training time "
        f"({seconds['cmd']:.1f} s of {seconds['training']:.0f} s)"
    )
    console.print(
        f"state: {bytes_now:.1f} bytes per parameter (during warm-up up to {bytes_peak:.1f})"
    )
    if "embedded" in summary:
        _print_embedded(console, summary["embedded"])
    folder = result.folder
    for path in (folder.result, folder.metrics, folder.modes, folder.model, folder.report):
        console.print(f"wrote {path}", soft_wrap=True)


def _print_embedded(console: Console, embedded: dict[str, Any]) -> None:
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


def _table(summary: dict[str, Any]) -> Table:
    config, data = summary["config"], summary["data"]
    seeds = config["seeds"]
    spread = f", mean ± std over {seeds} seeds" if seeds > 1 else ", 1 seed"
    table = Table(
        title=f"{config['model']} on {data['name']} after {config['epochs']} epochs{spread}",
        title_justify="left",
    )
    table.add_column("weights")
    table.add_column("accuracy (%)", justify="right")
    table.add_column("loss", justify="right")
    names = {
        "raw": "raw",
        "ema": f"EMA ({config['ema_decay']:g} a step)",
        "swa": "SWA (last quarter)",
        "cmd": f"CMD ({summary['modes']} modes)",
    }
    if "embedded" in summary:
        names["embedded"] = f"embedded ({config['embed_project']}), own training"
    for name, shown in names.items():
        accuracy = _cell(summary["accuracy"][name], summary["accuracy_std"][name], 100.0, 2)
        loss = _cell(summary["loss"][name], summary["loss_std"][name], 1.0, 4)
        table.add_row(shown, accuracy, loss)
    return table


def _cell(mean: float | None, std: float | None, factor: float, digits: int) -> str:
    if mean is None:
        return "not finite"
    if std is None:
        return f"{factor * mean:.{digits}f}"
    return f"{factor * mean:.{digits}f} ± {factor * std:.{digits}f}"
