"""What the commands of `cmd-plugin points` print when they have finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cmd_plugin.runs.result import Result

__all__ = ["show_explain", "show_robustness", "show_train"]


def show_train(result: Result) -> None:
    """Print how well the network does on held-out clouds."""
    found, data = result.metrics, result.data
    _console().print(
        f"{result.options['model']} on {data['name']}: {100 * found['accuracy']:.2f} % of "
        f"{data['held_out_clouds']} held-out clouds right, loss {found['loss']:.4f}, "
        f"{found['parameters']:,} weights, {result.seconds['training']:.0f} s of training"
    )


def show_explain(result: Result) -> None:
    """Print the network's answer to each cloud, its focus, and doubts about the axes."""
    console, metrics, points = _console(), result.metrics, result.data["points"]
    if "clouds" not in metrics:
        _show_cloud(console, metrics, points, result.data.get("trained_on"))
        return
    for name, found in metrics["clouds"].items():
        console.print(f"{name}:")
        _show_cloud(console, found, points[name], result.data["trained_on"])


def _show_cloud(
    console: Console, found: Mapping[str, Any], points: int, trained_on: int | None
) -> None:
    console.print(f"answer: {_answer(found)}, pool: {found['pool']}")
    if found["entropy"] is not None:
        focus = f"focus: H = {found['entropy']:.3f}, {found['critical_points']} critical points of"
        console.print(f"{focus} {points}")
    if trained_on is not None and points < trained_on:
        console.print(f"points: {points}, while the network was trained on {trained_on}")
    if "evidence_for" in found:
        console.print(f"evidence: what {found['evidence_for']} loses without each point")
    if "refocused" in found:
        again = found["refocused"]
        console.print(f"refocused on {again['kept']} points: {_answer(again)}")
        advice = "" if again["counts_tell_outliers"] else ", too badly to refocus by them"
        console.print(
            f"on this network counts rank planted outliers with AUROC {again['outlier_auroc']:.2f}"
            f"{advice}"
        )
    axes = found["axes"]
    if axes["better"] is not None:
        console.print(
            f"axes: with --axes {axes['better']} the network is "
            f"{100 * axes['better_confidence']:.1f} % sure of its answer, with {axes['given']} as "
            f"here {100 * axes['confidence']:.1f} %: was it trained with another axis up?"
        )
    for name, reason in found["left_out"].items():
        console.print(f"left out {name}: {reason}")


def show_robustness(result: Result) -> None:
    """Print accuracy level by level, the summary of every row, and EPiC's members."""
    methods, console = result.metrics["methods"], _console()
    console.print(_levels(methods, result.metrics["clouds"]))
    console.print(_summary(methods))
    console.print(_members(result.metrics["diversity"]["EPiC"]["all"]))
    if result.options["networks"] is not None:
        taken = f"networks were taken from {result.options['networks']}"
        console.print(taken, soft_wrap=True)  # a path is copied whole


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _answer(found: Mapping[str, Any]) -> str:
    return f"{found['answer']} ({100 * found['probability']:.1f} %)"


def _levels(methods: Mapping[str, Any], clouds: int) -> Table:
    """One block a corruption; narrow enough for 80 columns, clean accuracy is in the summary."""
    table = Table(
        title=f"Accuracy on {clouds} clouds, level by level",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("corruption, row")
    first = next(iter(methods.values()))["levels"]
    corruptions = [name for name in first if name != "clean"]
    for column in (*map(str, range(len(first[corruptions[0]]))), "mean", "CE"):
        table.add_column(column, justify="right")
    for corruption in corruptions:
        table.add_row(corruption)
        for name, found in methods.items():
            cells = (
                *found["levels"][corruption],
                found["accuracy"][corruption],
                found["ce"][corruption],
            )
            table.add_row(
                f"  {name}",
                *(f"{value:.3f}" for value in cells),
                end_section=name == list(methods)[-1],
            )
    return table


def _summary(methods: Mapping[str, Any]) -> Table:
    table = Table(
        title="Summary (mCE 1 is the published DGCNN on ModelNet-C; lower is better)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("row")
    for column in ("clean", "mOA", "mCE", "RmCE", "mCE against plain"):
        table.add_column(column, justify="right")
    base = methods["plain"]["mce"]
    for name, found in methods.items():
        table.add_row(
            name,
            *(f"{found[key]:.3f}" for key in ("clean", "moa", "mce", "rmce")),
            f"{found['mce'] / base - 1:+.1%}" if base else "",
        )
    return table


def _members(found: Mapping[str, Any]) -> str:
    """One sentence on EPiC's members."""
    parts = ", ".join(
        f"{view} {sum(row) / len(row):.3f}" for view, row in found["accuracy"].items()
    )
    correlation = found["overall"]["error_correlation"]
    together = (
        "they do not err" if correlation is None else f"errors correlate by {correlation:.2f}"
    )
    return (
        f"EPiC's members on all sets: {parts}; their vote {found['ensemble_accuracy']:.3f}, "
        f"{found['gap']:+.3f} against the mean member; {together}."
    )
