"""What `cmd-plugin bench kernels` prints when it has finished."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show"]


def show(result: Result) -> None:
    """Print one row a kernel, and what the columns mean."""
    rows, machine = result.metrics["kernels"], result.machine
    on = machine["accelerator"] if rows[0]["device"] == "cuda" else machine["processor"]
    table = Table(
        title=f"{rows[0]['size']:,} weights on {on}, {machine['threads']} threads",
        box=box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("kernel", no_wrap=True)
    table.add_column("path", no_wrap=True)
    for column in ("ms", "B", "GB/s", "copy", "eager", "compile", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["seconds"] is None:
            table.add_row(row["kernel"], *"-" * 8)
            continue
        table.add_row(
            row["kernel"],
            row["backend"],
            _short(1e3 * row["seconds"], 2),
            f"{row['bytes_per_weight']:g}",
            _short(row["gbps"], 1),
            f"{row['fraction_of_copy']:.0%}",
            _times(row["speedup_vs_eager"]),
            _times(row["speedup_vs_compile"]),
            "wrong" if row["max_error"] is None else f"{row['max_error']:.0e}",
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        "B: bytes a weight. copy: share of the copy bandwidth. eager, compile: times faster than "
        "the specification in PyTorch. error: largest, against float64."
    )
    for row in rows:
        if "memory" in row.get("note", ""):
            console.print(f"{row['kernel']}: {row['note']}.")
    if rows[0]["device"] == "cpu" and machine["accelerator"] is None:
        console.print("There is no CUDA device here: Triton's kernels were not measured.")


def _times(value: float | None) -> str:
    return "-" if value is None else f"{_short(value, 1)}x"


def _short(value: float, digits: int) -> str:
    """Return a number whose fraction is left out where it says nothing: from 100 on."""
    return f"{value:.{digits}f}" if value < 100 else f"{value:.0f}"
