"""What `cmd-plugin federated simulate` prints when it has finished."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show"]

_ROWS = 12


def show(result: Result) -> None:
    """Print the table of the rounds, and what was sent in all."""
    metrics = result.metrics
    console = Console(highlight=False)
    console.print(_table(result))
    up, down = metrics["bytes_up"] / 1e6, metrics["bytes_down"] / 1e6
    console.print(
        f"accuracy {metrics['accuracy']:.4f} with {up + down:.2f} MB ({up:.2f} up, {down:.2f} down)"
    )
    console.print(
        f"{metrics['bytes_of_fedavg']:.1%} of FedAvg's {metrics['fedavg_bytes'] / 1e6:.2f} MB"
    )
    if metrics["refusals"]:
        console.print(f"{len(metrics['refusals'])} updates were refused, see result.json")


def _table(result: Result) -> Table:
    options, rounds = result.options, result.metrics["rounds"]
    table = Table(
        title=f"{options['method']} with {options['clients']} clients on {result.data['name']}, "
        f"{options['partition']}",
        title_justify="left",
    )
    for name in ("round", "accuracy", "loss", "kB up", "kB down", "of FedAvg", "not sent"):
        table.add_column(name, justify="right")
    step = -(-(len(rounds) - 1) // _ROWS)
    for ended in rounds[1:]:
        if ended["round"] % step and ended["round"] != len(rounds) - 1:
            continue
        sent = ended["bytes_up"] + ended["bytes_down"]
        share = sent / ended["fedavg_bytes"] if ended["fedavg_bytes"] else float("nan")
        table.add_row(
            str(ended["round"]),
            f"{ended['accuracy']:.4f}",
            f"{ended['loss']:.4f}",
            f"{ended['bytes_up'] / 1e3:.1f}",
            f"{ended['bytes_down'] / 1e3:.1f}",
            f"{share:.1%}",
            f"{ended['embedded_fraction']:.1%}",
        )
    return table
