"""``cmd-plugin bench``: what this machine makes of the kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

__all__ = ["bench"]

bench = typer.Typer(
    help="Measure this package on this machine.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@bench.callback()
def _group() -> None:
    """Measure this package on this machine."""


@bench.command("kernels")
def measure(
    size: Annotated[int, typer.Option(help="Number of weights N.")] = 10_000_000,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only this kernel (repeatable); all by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads on a CPU; PyTorch's own number by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Calls that are timed.")] = 15,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line a kernel.")] = False,
) -> None:
    """Time every kernel against the copy bandwidth of its device, and check its error.

    The kernels are measured on random weights. Each is compared with its specification in plain
    PyTorch (eager, and through torch.compile where there is a compiler) on the same tensors.

    Example: cmd-plugin bench kernels --size 1000000 --no-compile
    """
    import torch

    from cmd_plugin.cli._output import progress_line
    from cmd_plugin.errors import InputError
    from cmd_plugin.kernels.bench import measure_kernels
    from cmd_plugin.machine import describe_machine

    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be at least 1, got {threads}.")
        torch.set_num_threads(threads)
    machine = describe_machine()
    rows = []
    with progress_line(quiet=as_json) as show:
        options: dict[str, Any] = {"repeats": repeats, "compiled": compiled, "device": device}
        for row in measure_kernels(size, kernel or (), **options, progress=show):
            if as_json:
                typer.echo(json.dumps({**row, **machine}))
            rows.append(row)
    if not as_json:
        _print(rows, machine)


def _print(rows: Iterable[dict[str, Any]], machine: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    on = machine["accelerator"] if rows[0]["device"] == "cuda" else machine["processor"]
    title = f"{rows[0]['size']:,} weights on {on}, {machine['threads']} threads"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    table.add_column("path")
    for column in ("ms", "B", "GB/s", "copy", "eager", "compile", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        fused = row["speedup_vs_compile"]
        table.add_row(
            row["kernel"],
            row["backend"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['bytes_per_weight']:g}",
            f"{row['gbps']:.1f}",
            f"{100 * row['fraction_of_copy']:.0f} %",
            f"{row['speedup_vs_eager']:.1f}x",
            "-" if fused is None else f"{fused:.1f}x",
            f"{row['max_error']:.0e}",
        )
    console = Console()
    console.print(table)
    console.print(
        "B: bytes a weight. copy: share of the copy bandwidth. eager, compile: times faster than "
        "the specification in PyTorch. error: largest, against float64.",
        highlight=False,
    )
    if rows[0]["device"] == "cpu" and machine["accelerator"] is None:
        typer.echo("There is no CUDA device here: Triton's kernels were not measured.")
