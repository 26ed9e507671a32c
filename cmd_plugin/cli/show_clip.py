"""What the commands of `cmd-plugin clip` print when they have finished."""

from __future__ import annotations

from collections.abc import Mapping
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
            f"{share:.1%} of the rows are rarer than 95 % of the reference (of its own, 5 %)"
        )
    if found["not_finite"]:
        console.print(f"{found['not_finite']:,} rows hold NaN or infinite values: no scores")
    named = "name" in found["columns"]
    for title, key in (("rarest", "lowest"), ("most usual", "highest")):
        table = _table(title, "row", "log-likelihood", *(["name"] if named else []))
        for row in found[key][:5]:
            cells = [str(row["row"]), f"{row['log_likelihood']:.1f}"]
            table.add_row(*cells, *([row["name"]] if named else []))
        console.print(table)


def show_report(result: Result) -> None:
    """Print the shape of each set, and what lies between pairs."""
    console, found = _console(), result.metrics
    _show_input(console, result.data)
    for name, one in found.items():
        if name != "pairs":
            _show_set(console, name, one)
    if "pairs" not in found:
        return
    pairs = found["pairs"]
    recall = {name: values["1"] for name, values in pairs["recall"].items()}
    console.print(
        f"gap {pairs['gap']:.4f}, cosine of a pair {pairs['paired_cosine']:.3f}; R@1 image to text "
        f"{recall['image_to_text']:.3f}, text to image {recall['text_to_image']:.3f}"
    )
    alpha = pairs["alpha"]
    console.print(
        f"contrastive loss least at alpha {alpha['best']:g}: {min(alpha['loss']):.3f} nats"
    )
    best = pairs["separability"][0]
    console.print(
        f"feature {best['feature']} separates best: {best['accuracy']:.1%} right by one threshold"
    )


def _show_set(console: Console, name: str, found: Mapping[str, Any]) -> None:
    console.print(
        f"{name}s: mean norm {found['mean_norm']:.3f}, shell {found['radius']:.3f} ± "
        f"{found['thickness']:.3f}, anisotropy {found['anisotropy']:.3f}, conformity "
        f"{found['conformity']['mean']:.3f}"
    )
    tests = ", ".join(
        f"{test['anderson_pass']:.0%} ({test['group_size']} rows)" for test in found["normality"]
    )
    console.print(f"  whitened features that pass Anderson-Darling: {tests}")


def show_compare(result: Result) -> None:
    """Print both tests."""
    console, found = _console(), result.metrics
    for name in ("reference", "sample"):
        data = result.data[name]
        norm = found["mean_norm"][name]
        console.print(f"{name}: {data['rows']:,} {data['kind']}, mean norm {norm:.3f}")
    verdict = "they differ" if found["alarm"] else "no difference found"
    console.print(
        f"permutation test: p = {found['p_value']:.4f}, squared MMD {found['mmd']:.2e} "
        f"(level {result.options['level']:g}): {verdict}"
    )
    console.print(f"a linear classifier tells them apart with AUC {found['auc']:.3f} (chance 0.5)")


def show_align(result: Result) -> None:
    """Print retrieval before and after, in a mixed gallery and in one modality alone."""
    console, data = _console(), result.data
    sizes = " and ".join(map(str, data["gallery"]))
    console.print(f"{data['rows']:,} pairs; tested on halves of {sizes}, fitted on the other half")
    titles = {
        "text_to_image": "Texts look for their image",
        "image_to_text": "Images look for their text",
    }
    for direction, title in titles.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        table.add_column("recall at")
        for kind in ("mixed", "alone"):
            for k in (1, 5, 10):
                table.add_column(f"{kind} {k}" if k == 1 else str(k), justify="right", no_wrap=True)
        for name, found in result.metrics["retrieval"].items():
            cells = [v for kind in ("mixed", "alone") for v in found[direction][kind].values()]
            table.add_row(name, *(f"{value:.3f}" for value in cells))
        console.print(table)
    console.print(
        "mixed: among all images and all other texts; alone: among the other modality only."
    )


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
    for name in columns:
        if name == "name":  # only names give way on a narrow terminal
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False)
