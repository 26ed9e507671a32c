"""What the commands of `cmd-plugin diffusion` print when they have finished."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show_memorization", "show_train"]


def show_train(result: Result) -> None:
    """Print what was trained, and how well its training images can be told from held-out ones."""
    found, data, console = result.metrics, result.data, _console()
    console.print(
        f"{result.options['model']} on {data['name']}: {data['images']} images in {data['rows']} "
        f"rows, {found['steps']} steps, loss {found['loss']:.4f}, {found['parameters']:,} weights, "
        f"{result.seconds['training']:.0f} s of training"
    )
    if "auroc" in found:
        console.print(_doses(found["auroc"], found["time"]))
        reached = [f"{group} at step {step}" for group, step in found["tau_mem"].items()]
        console.print(f"told from held-out images above .6: {', '.join(reached) or 'nothing'}")


def show_memorization(result: Result) -> None:
    """Print the p-value of suspects, the most memorised images of a folder, or AUROC by dose."""
    found, console = result.metrics, _console()
    if "p_value" in found:
        power = [
            f"{size} images {'-' if rate is None else f'{100 * rate:.0f} %'}"
            for size, rate in found["power"].items()
        ]
        console.print(
            f"p = {found['p_value']:.4g} that {result.data['suspects']} suspects lead "
            f"{result.data['controls']} controls by chance (AUROC {found['auroc']:.3f}, by pixels "
            f"alone {found['pixel_auroc']:.3f})"
        )
        console.print(f"chance to find such a lead at 5 %: {', '.join(power)}")
        kinds = found["file_kinds"]
        if kinds["suspects"] != kinds["controls"]:
            console.print(
                f"files differ: suspects {', '.join(kinds['suspects'])}, controls "
                f"{', '.join(kinds['controls'])}; the lead may be one of file formats"
            )
    elif "most_memorised" in found:
        console.print(f"{result.data['images']} images, the most memorised first:")
        for name, value in found["most_memorised"].items():
            console.print(f"  {value:.3f}  {name}", soft_wrap=True)
    else:
        console.print(_doses(found["auroc"], found["t"][0]))
    for line in found.get("left_out", ()):
        console.print(f"left out: {line}", soft_wrap=True)


def _doses(auroc: Mapping[str, Mapping[str, float]], time: float) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"AUROC against held-out images, t = {time:g}",
        title_justify="left",
    )  # fmt: skip
    table.add_column("statistic")
    for dose in next(iter(auroc.values())):
        table.add_column(f"x{dose}", justify="right")
    for name, doses in auroc.items():
        table.add_row(name, *(f"{value:.3f}" for value in doses.values()))
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False)
