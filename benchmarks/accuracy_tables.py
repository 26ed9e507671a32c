"""Tables of ``cmd_accuracy``: accuracies, paired differences to the raw weights, one for each need.

A difference is paired: both accuracies come from the same seed. Its interval is the mean over the
seeds plus or minus Student's t times the standard error, 95 % for each comparison by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

__all__ = ["markdown", "paired", "show"]

_LEVEL = 0.95

# Methods that differ in a number somebody has to choose, by how their names begin.
FAMILIES = {
    "ema ": "EMA",
    "swa": "SWA",
    "lawa": "LAWA",
    "tail ema": "tail-EMA blend",
    "post-hoc": "post-hoc EMA",
    "rre": "RRE, MPE",
    "mpe": "RRE, MPE",
    "schedule-free": "schedule-free SGD",
    "p-bfgs": "P-BFGS",
    "cmd ": "CMD, options chosen",
}
BLEND = "CMD blend"
PAPER = "cmd M=10"


@dataclass(frozen=True)
class Column:
    """What was measured on one problem with one kind of statistics.

    Attributes:
        data: The data set.
        norm: The network's normalisation.
        schedule: ``constant`` or ``cosine``.
        kind: The kind of statistics.
        case: The problem's settings.
        accuracy: Accuracy in % by name, one for each seed; in the same order of seeds.
        loss: Mean cross-entropy likewise; None where it was not finite.
    """

    data: str
    norm: str
    schedule: str
    kind: str
    case: dict[str, Any]
    accuracy: dict[str, list[float]]
    loss: dict[str, list[float | None]]

    @property
    def title(self) -> str:
        """Normalisation and statistics in words."""
        batchnorm = f"BatchNorm, {self.kind} statistics"
        return "GroupNorm" if self.norm == "groupnorm" else batchnorm


def columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """Gather rows of single runs into columns; schedule-free runs stand beside both schedules."""
    groups: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["data"], row["norm"], row["schedule"]
        groups.setdefault(key, {})[row["seed"]] = row
    found = []
    for (data, norm, schedule), group in groups.items():
        if schedule == "schedule-free":
            continue
        free = groups.get((data, norm, "schedule-free"), {})
        scores = [
            row["scores"] | free.get(seed, {"scores": {}})["scores"]
            for seed, row in sorted(group.items())
        ]
        first = next(iter(group.values()))
        for index, kind in enumerate(first["statistics"]):
            known = [
                name
                for name in scores[0]
                if all(name in score and score[name][index] is not None for score in scores)
            ]
            found.append(
                Column(
                    data,
                    norm,
                    schedule,
                    kind,
                    first,
                    {n: [100 * score[n][index][0] for score in scores] for n in known},
                    {n: [score[n][index][1] for score in scores] for n in known},
                )
            )
    return found


def paired(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of pairs and half the width of its interval.

    The half width is infinite for a single pair, which says nothing about others.
    """
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    if len(differences) < 2:
        return differences[0], float("inf")
    t = float(stdtrit(len(differences) - 1, (1 + _LEVEL) / 2))
    return fmean(differences), t * stdev(differences) / sqrt(len(differences))


def family(name: str) -> str:
    """Return the family of a method; raw weights are one by themselves."""
    if name.startswith("cmd ") and ", l=" in name:
        return BLEND
    return next((kind for start, kind in FAMILIES.items() if name.startswith(start)), name)


def chosen_on_others(accuracy: dict[str, list[float]], names: Sequence[str]) -> list[float]:
    """Return each seed's accuracy by the method that is best on the mean of all other seeds.

    So no method is chosen by the result that is reported. A single seed has no others: the first
    method is taken then.
    """
    totals = {name: sum(accuracy[name]) for name in names}
    found = []
    for seed in range(len(accuracy[names[0]])):
        best = max(names, key=lambda n: totals[n] - accuracy[n][seed])
        found.append(accuracy[best][seed])
    return found


def by_family(column: Column) -> dict[str, list[float]]:
    """Return one accuracy a seed for each family of methods, the raw weights first."""
    names: dict[str, list[str]] = {}
    for name in column.accuracy:
        names.setdefault(family(name), []).append(name)
    found = {kind: chosen_on_others(column.accuracy, group) for kind, group in names.items()}
    # The paper's method without a choice, before the one with it.
    chosen = found.pop(FAMILIES["cmd "])
    blend = found.pop(BLEND)
    fixed = {"CMD, M=10 (paper)": column.accuracy[PAPER]}
    return found | fixed | {FAMILIES["cmd "]: chosen, BLEND: blend}


def _gain(mine: Sequence[float], raw: Sequence[float]) -> str:
    mean, half = paired(mine, raw)
    return f"{mean:+.1f}" if half == float("inf") else f"{mean:+.1f} ± {half:.1f}"


def _level(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


@dataclass(frozen=True)
class Verdict:
    """How one method with one setting did over many columns, against raw weights.

    Attributes:
        name: The method.
        better: Columns whose interval lies above zero.
        worse: Columns whose interval lies below zero.
        mean: Mean gain over the columns, in points.
        worst: Smallest mean gain of a column.
        where: That column.
        columns: Number of columns.
    """

    name: str
    better: int
    worse: int
    mean: float
    worst: float
    where: str
    columns: int


def verdicts(chosen: Sequence[Column]) -> list[Verdict]:
    """Judge every method that was measured in all of some columns, the safest first."""
    names = [n for n in chosen[0].accuracy if all(n in c.accuracy for c in chosen) and n != "raw"]
    found = []
    for name in names:
        gains = [paired(c.accuracy[name], c.accuracy["raw"]) for c in chosen]
        means = [mean for mean, _ in gains]
        lowest = chosen[means.index(min(means))]
        found.append(
            Verdict(
                name,
                sum(mean - half > 0 for mean, half in gains),
                sum(mean + half < 0 for mean, half in gains),
                fmean(means),
                min(means),
                f"{lowest.data}, {lowest.schedule}, {lowest.title}",
                len(gains),
            )
        )
    return sorted(found, key=lambda v: (v.worse, -v.worst))


def _blocks(found: Sequence[Column]) -> dict[str, list[Column]]:
    """Gather the columns of each kind of statistics."""
    groups: dict[str, list[Column]] = {}
    for column in found:
        groups.setdefault(column.title, []).append(column)
    return groups


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each column: accuracy, loss and the paired difference to raw weights."""
    for title, block in _blocks(columns(rows)).items():
        for column in block:
            case, seeds = column.case["case"], len(column.accuracy["raw"])
            table = Table(
                title=f"{column.data}, {column.schedule} rate, {title}: "
                f"{column.case['train_images']} training images, {case['epochs']} epochs, "
                f"label noise {case['label_noise']:g}, {seeds} seed(s)"
            )
            table.add_column("weights")
            for head in ("accuracy %", "loss", "against raw, 95 %"):
                table.add_column(head, justify="right")
            for name, accuracy in column.accuracy.items():
                losses = [x for x in column.loss[name] if x is not None]
                table.add_row(
                    name,
                    _level(accuracy),
                    f"{fmean(losses):.3f}" if len(losses) == seeds else "not finite",
                    _gain(accuracy, column.accuracy["raw"]),
                )
            console.print(table)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables of the docs: families, single settings, and all methods."""
    lines, every = [], []
    for title, block in _blocks(columns(rows)).items():
        heads = [f"{c.data}, {c.schedule}" for c in block]
        families = [by_family(c) for c in block]
        lines += [f"## {title}", "", *_head("weights", heads)]
        lines.append(_line("raw", [_level(f["raw"]) for f in families]))
        for kind in families[0]:
            if kind != "raw":
                cells = [_gain(f[kind], f["raw"]) if kind in f else "" for f in families]
                lines.append(_line(kind, cells))
        lines.append("")
        every += [f"## All methods: {title}", "", *_head("weights", heads)]
        every += [
            _line(name, [_level(c.accuracy[name]) if name in c.accuracy else "" for c in block])
            for name in block[0].accuracy
        ]
        every.append("")
    # Statistics of the test batch say nearly the same as recalibrated ones, and running ones are
    # those of other weights.
    chosen = [c for c in columns(rows) if c.kind in ("recalibrated", "none")]
    lines += ["## One setting for all", ""]
    lines += _head("weights", ["better", "worse", "mean gain", "worst gain", "where"])
    for v in verdicts(chosen):
        counts = [f"{v.better} of {v.columns}", f"{v.worse} of {v.columns}"]
        lines.append(_line(v.name, [*counts, f"{v.mean:+.1f}", f"{v.worst:+.1f}", v.where]))
    return "\n".join([*lines, "", *every])


def _head(first: str, others: Sequence[str]) -> list[str]:
    return [_line(first, others), "|---|" + "---|" * len(others)]


def _line(first: str, others: Sequence[str]) -> str:
    return f"| {first} | " + " | ".join(others) + " |"
