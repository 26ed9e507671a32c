"""What the commands of `cmd-plugin clip` print when they have finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = [
    "show_align",
    "show_compare",
    "show_fit",
    "show_merge",
    "show_report",
    "show_score",
]


def show_fit(result: Result) -> None:
    """Print what was fitted, and how optimistic its scores of its own rows are."""
    console = _console()
    _show_input(console, result.data)
    _show_whitening(console, result.metrics)


def show_merge(result: Result) -> None:
    """Print what came out of how many fits."""
    console = _console()
    console.print(f"{len(result.data['inputs'])} fits, {result.data['rows']:,} rows")
    _show_whitening(console, result.metrics)


def show_score(result: Result) -> None:
    """Print means, and the rows that stand out."""
    console, found = _console(), result.metrics
    _show_input(console, result.data)
    line = f"mean log-likelihood {found['mean_log_likelihood']:.1f} nats"
    if found["mean_conformity"] is not None:
        line += f", mean conformity {found['mean_conformity']:.3f}"
    console.print(line)
    share = found["below_5_percent"]
    if share is not None:
        console.print(
            f"{share:.1%} of the rows are rarer than 95 % of the reference (5 % if they are like it)"
        )
    if found["not_finite"]:
        console.print(f"{found['not_finite']:,} rows hold NaN or infinite values: no scores")
    for title, key in (("rarest", "lowest"), ("most usual", "highest")):
        table = _table(title, "row", "log-likelihood", "name")
        for row in found[key][:5]:
            table.add_row(str(row["row"]), f"{row['log_likelihood']:.1f}", row["name"])
        console.print(table)


def _show_input(console: Console, data: Mapping[str, Any]) -> None:
    text = f"{data['rows']:,} {data['kind']} of {data['dimension']} values"
    if data["left_out"]:
        text += f"; {data['left_out']} could not be read, see left_out.csv"
    console.print(text)


def _show_whitening(console: Console, found: Mapping[str, Any]) -> None:
    shrunk = "not shrunk"
    if found["shrinkage"] != "none":
        shrunk = f"shrunk ({found['shrinkage']}, {found['intensity']:.3f})"
    console.print(
        f"covariance of {found['rows']:,} rows: rank {found['rank']} of {found['dimension']}, "
        f"{shrunk}, {found['floored']} variances raised to the floor"
    )
    if found["skipped_rows"]:
        console.print(f"{found['skipped_rows']:,} rows hold NaN or infinite values: left out")
    if found["leave_one_out"] is None:
        console.print("no leave-one-out reference: scores get no percentiles")
    else:
        console.print(
            f"mean squared norm of the rows {found['in_sample']:.1f}, as if each had not been in "
            f"the fit {found['leave_one_out']:.1f}"
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in columns[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False)
