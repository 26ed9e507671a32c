"""What `cmd-plugin decompose` prints when it has finished."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show"]


def show(result: Result) -> None:
    """Print the modes by tensor, and what they are worth as a codec."""
    metrics = result.metrics
    console = Console(highlight=False, markup=False)
    console.print(_table(result))
    snapshots, weights = metrics["snapshots"], f"{metrics['parameters']:,} weights"
    explained = metrics["explained_variance"]
    if explained is None:
        console.print(f"None of the {weights} moves over {snapshots} snapshots.")
    else:
        console.print(
            f"{metrics['modes']} modes explain {explained:.1%} of the movement of {weights} over "
            f"{snapshots} snapshots."
        )
    console.print(
        f"As a codec: {metrics['modes_bytes']:,} bytes for {metrics['weight_bytes']:,} bytes of "
        f"weights, {metrics['compression_ratio']:.1f} times smaller (the files hold "
        f"{metrics['checkpoint_bytes']:,}); relative error {metrics['relative_error']:.2e}."
    )
    left_out = result.data["left_out"]
    if left_out:
        console.print(f"Files that could not be read and were left out: {len(left_out)}.")


def _table(result: Result) -> Table:
    layers = result.metrics["layers"]
    still = any(layer["explained_variance"] is None for layer in layers)
    table = Table(
        title="Correlated modes by tensor",
        caption="still: the tensor does not move." if still else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # Only the names give way on a narrow terminal: they are folded, so that numbers stay whole.
    table.add_column("tensor", overflow="fold")
    for column in ("weights", "explained", "modes", "main mode", "its share"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in layers:
        explained = layer["explained_variance"]
        table.add_row(
            layer["name"],
            f"{layer['weights']:,}",
            "still" if explained is None else f"{explained:.1%}",
            str(layer["modes_used"]),
            str(layer["main_mode"]),
            f"{layer['main_share']:.0%}",
        )
    return table
