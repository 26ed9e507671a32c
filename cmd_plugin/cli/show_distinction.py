"""What the commands of `cmd-plugin distinction` print when they have finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show_evaluate", "show_explain", "show_train"]

_ROWS = 20


def show_train(result: Result) -> None:
    """Print how good classifier, judge and split are."""
    console, found = _console(), result.metrics
    split, classes = found["split"], result.data["classes"]
    console.print(
        f"{result.options['objective']} on {result.data['name']}: classifier "
        f"{found['classifier']['accuracy']:.1%}, judge {found['judge']['accuracy']:.1%} right; "
        f"PSNR of the sum {_number(split['psnr'], 1)} dB; {found['parameters']:,} weights, "
        f"{result.seconds['training']:.0f} s of training"
    )
    table = _table("Accuracy with and without the distinct part")
    for column in ("class", "classifier", "without", "judge", "without"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for number, name in enumerate(classes):
        rows = ("accuracy", "removed", "judge_accuracy", "judge_removed")
        table.add_row(
            name, *(_number(split[row][number], 3) if split[row] else "-" for row in rows)
        )
    console.print(table)
    _warn(console, found)


def show_evaluate(result: Result) -> None:
    """Print the decomposition's row and its rivals', and what they mean."""
    console, found = _console(), result.metrics
    planted = found["plant"] is not None
    table = _table(f"On {result.data['images']} held-out images; areas: lower is better")
    table.add_column("explanation")
    plant = ("IoU", "NCC") if planted else ()
    for column in (*plant, "removal", "by judge", "deletion", "placed", "filled", "placed"):
        table.add_column(column, justify="right")
    for name, row in {"distinction": found, **found["rivals"]}.items():
        table.add_row(name, *_cells(row, planted=planted))
    console.print(table)
    console.print("placed: deletion between a random ranking (0) and a greedy one (1).")
    accuracy = ", ".join(
        f"{name} {_number(value, 2)}"
        for name, value in zip(result.data["classes"], found["judge_accuracy"], strict=True)
    )
    console.print(
        f"PSNR of the sum {_number(found['psnr'], 1)} dB, COUT {found['cout']:.3f}; the judge "
        f"without the distinct part: {accuracy}"
    )
    for name, reason in found["rivals_left_out"].items():
        console.print(f"left out {name}: {reason}")
    _warn(console, found)


def show_explain(result: Result) -> None:
    """Print the confidence in each image's class before and after."""
    console, found = _console(), result.metrics
    rows = list(found["images"].items())
    table = _table("Probability of the class, before and without the distinct part")
    for column in ("image", "class", "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for name, one in rows[:_ROWS]:
        table.add_row(name, one["target"], _number(one["before"], 3), _number(one["after"], 3))
    console.print(table)
    if len(rows) > _ROWS:
        console.print(f"and {len(rows) - _ROWS} more, see result.json")
    if result.data["left_out"]:
        console.print(f"{result.data['left_out']} images beyond --limit were left out")
    if "masks" in found:
        masks = found["masks"]
        console.print(
            f"against what is marked in {masks['marked']} images: IoU {_number(masks['iou'], 3)}, "
            f"pointing game {_number(masks['pointing'], 3)}, {_number(masks['mass'], 2)} times the "
            "mass of chance"
        )


def _cells(row: Mapping[str, Any], *, planted: bool) -> list[str]:
    removal, deletion = row["auc"]["removal"], row["auc"]["deletion"]
    cells = [removal["classifier"], removal["judge"]]
    for fill in ("grey", "filled"):
        cells += [deletion[fill], deletion[f"{fill}_normalised"]]
    plant = [row["plant"]["iou"], row["plant"]["ncc"]] if planted else []
    return [_number(value, 3) for value in (*plant, *cells)]


def _warn(console: Console, found: Mapping[str, Any]) -> None:
    for sentence in found["warnings"]:
        console.print(f"warning: {sentence}")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _console() -> Console:
    return Console(highlight=False, markup=False)
