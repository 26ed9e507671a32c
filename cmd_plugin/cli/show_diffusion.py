"""What the commands of `cmd-plugin diffusion` print when they have finished."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show_calibrate", "show_detect", "show_fewshot", "show_memorization", "show_train"]


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
        console.print(_pairs(found["pairs"], found["t"][0]))
        for pair, names in found["alike"].items():
            if names:
                console.print(f"{pair}: told apart no better than by chance by {', '.join(names)}")
    for line in found.get("left_out", ()):
        console.print(f"left out: {line}", soft_wrap=True)


def show_calibrate(result: Result) -> None:
    """Print how far real images reach."""
    found, console = result.metrics, _console()
    console.print(
        f"{found['images']} real images; mean and one standard deviation of the criterion "
        f"{found['threshold']:.4g}; smallest p-value {found['smallest_p']:.3g}"
    )
    for line in found["left_out"]:
        console.print(f"left out: {line}", soft_wrap=True)


def show_detect(result: Result) -> None:
    """Print how many images are real, generated or unsure, and how well kinds are told."""
    found, console = result.metrics, _console()
    counts = ", ".join(f"{count} {kind}" for kind, count in found["counts"].items())
    console.print(
        f"{result.data['images']} images at level {found['level']:g}: {counts} "
        f"(against {found['real_images']} real ones)"
    )
    for kind, groups in found.get("separation", {}).items():
        table = Table(
            box=box.SIMPLE_HEAD, title=f"AUROC, {kind} above real", title_justify="left"
        )  # fmt: skip
        table.add_column("statistic")
        for group in groups:
            table.add_column(group, justify="right")
        control = found["control"]
        table.add_column("real above real", justify="right")
        for name in groups["raw"]:
            cells = [f"{group[name]['auroc']:.3f}" for group in groups.values()]
            table.add_row(name, *cells, "-" if control is None else f"{control[name]:.3f}")
        console.print(table)
    for line in found["warnings"]:
        console.print(f"warning: {line}", soft_wrap=True)
    for line in found["left_out"]:
        console.print(f"left out: {line}", soft_wrap=True)


def show_fewshot(result: Result) -> None:
    """Print how well so many labels tell generators that were seen, and others."""
    found, console = result.metrics, _console()
    table = Table(
        box=box.SIMPLE_HEAD, title="AUROC, mean and lowest of the tests", title_justify="left"
    )  # fmt: skip
    for heading in ("labels of each kind", "seen generator", "unseen generator"):
        table.add_column(heading, justify="right")
    for count in found["seen"]:
        cells = [
            "-" if cell is None else f"{cell['mean']:.3f} ({cell['lowest']:.3f})"
            for cell in (found["seen"][count], found["unseen"][count])
        ]
        table.add_row(count, *cells)
    console.print(table)
    for line in found["left_out"]:
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


def _pairs(pairs: Mapping[str, Mapping[str, float]], time: float) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"AUROC of one group above another, t = {time:g}",
        title_justify="left",
    )  # fmt: skip
    table.add_column("statistic")
    for pair in pairs:
        table.add_column(pair, justify="right")
    for name in next(iter(pairs.values())):
        table.add_row(name, *(f"{found[name]:.3f}" for found in pairs.values()))
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False)
