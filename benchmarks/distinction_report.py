"""Tables of what `benchmarks.distinction` measured, and one file out of many.

    python -m benchmarks.distinction_report                          # tables of the committed rows
    python -m benchmarks.distinction_report --merge OUT/*.jsonl      # take other rows in first
    python -m benchmarks.distinction_report --docs                   # write them into the docs

Rows of one experiment, objective, seed and device that are there twice are compared and kept once.
All numbers are medians over the seeds; CPU and GPU rows never share a median. The thresholds were
set before anything was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS

Row = dict[str, Any]
Group = tuple[str, str, str]  # experiment, objective, device

_PAGE = RESULTS.parent.parent / "docs" / "distinction.md"
_START = "<!-- made by python -m benchmarks.distinction_report --docs -->"
_END = "<!-- the end of what is made -->"
_DIGITS = 5
_OURS = ("dxai_distilled", "distinction", "dxai", "uniform")

# Median over the seeds, and the side it has to be on; those of the specification.
WANTED: dict[tuple[str, str], dict[str, tuple[str, float]]] = {
    ("cross", "dxai_distilled"): {
        "IoU": ("at least", 0.85),
        "NCC": ("at least", 0.78),
        "PSNR": ("at least", 26.0),
        "judge, class 1": ("at most", 0.10),
        "IoU above rivals": ("at least", 0.20),
        "class cosine": ("at most", 0.9),
    },
    ("cross", "distinction"): {"IoU": ("at least", 0.85), "NCC": ("at least", 0.75)},
    ("cross", "dxai"): {"IoU": ("at least", 0.50), "NCC": ("at least", 0.60)},
    ("noise", "dxai_distilled"): {
        "signed": ("at least", 0.75),
        "remainder": ("at most", 0.45),
        "NCC over rivals": ("at least", 1.3),
    },
    ("tint", "dxai_distilled"): {"cosine": ("at least", 0.9)},
    ("control", "dxai_distilled"): {
        "judge moved": ("at most", 0.1),
        "another judge moved": ("at most", 0.1),
    },
    ("mnist-3-8", "dxai_distilled"): {
        "removal": ("at most", 0.62),
        "removal below rivals": ("at least", 0.03),
        "by judge": ("at most", 0.62),
        "deletion": ("at most", 0.72),
        "PSNR": ("at least", 25.0),
    },
    ("cifar-car-truck", "dxai_distilled"): {
        "removal": ("at most", 0.65),
        "by judge": ("at most", 0.65),
    },
}

_PLANT = ("IoU", "NCC", "signed", "cosine", "remainder")
# Noise and tint are everywhere, so any map overlaps them; a tint has no pattern to correlate with.
_SHOWN = {
    "cross": ("IoU", "NCC", "signed", "remainder"),
    "noise": ("NCC", "signed", "remainder"),
    "tint": ("cosine", "remainder"),
}
_AREAS = ("removal", "by judge", "deletion", "filled", "placed")


def key_of(row: Row) -> tuple[str, str, str, int]:
    """Experiment, objective, device and seed, of which there is one row."""
    return row["experiment"], row["objective"], row["config"]["accelerator"], row["seed"]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def rounded(value: Any) -> Any:
    """The same JSON types with numbers of five digits after the point."""
    text = json.dumps(value, allow_nan=False)
    return json.loads(text, parse_float=lambda number: round(float(number), _DIGITS))


def merge(target: Path, sources: Iterable[Path]) -> list[Row]:
    """Take the rows of other files into one, say which were measured twice, and return all."""
    rows = {key_of(row): row for row in read_rows(target)}
    for source in sources:
        for row in read_rows(source):
            known = rows.setdefault(key_of(row), row)
            if known is not row:
                same = "the same" if known["found"] == row["found"] else "NOT the same"
                print(f"{source.name}: {key_of(row)} was measured before, and is {same}")
    found = [rows[key] for key in sorted(rows)]
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in found]
    target.write_text("".join(lines), encoding="utf-8")
    return found


def _scores(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of one explanation, ours or a rival's."""
    plant, area = found["plant"] or {}, found["auc"]
    names = {"IoU": "iou", "NCC": "ncc"}
    return {
        **{column: plant.get(names.get(column, column)) for column in _PLANT},
        "removal": area["removal"]["classifier"],
        "by judge": area["removal"]["judge"],
        "deletion": area["deletion"]["grey"],
        "filled": area["deletion"]["filled"],
        "placed": area["deletion"]["filled_normalised"],
    }


def summarise(row: Row) -> dict[str, float | None]:
    """All numbers of a row that have a threshold or a column."""
    found, split = row["found"], row["found"]["split"]
    ours = _scores(found)
    rivals = [_scores(rival) for rival in found["rivals"].values()]
    judged = found["judge_accuracy"]
    best = {name: max(_known(rivals, name), default=None) for name in ("IoU", "NCC")}
    lowest = min(_known(rivals, "removal"), default=None)
    moved = {"judge moved": (split["judge_accuracy"], split["judge_removed"])}
    if (other := found.get("another_judge")) is not None:
        moved["another judge moved"] = (other["accuracy"], other["removed"])
    return {
        **ours,
        "IoU above rivals": _apply(lambda a, b: a - b, ours["IoU"], best["IoU"]),
        "NCC over rivals": _apply(lambda a, b: a / b, ours["NCC"], best["NCC"] or None),
        "removal below rivals": _apply(lambda a, b: b - a, ours["removal"], lowest),
        "PSNR": found["psnr"],
        **{f"judge, class {label}": value for label, value in enumerate(judged)},
        **{
            name: abs(statistics.mean(after) - statistics.mean(before))
            for name, (before, after) in moved.items()
        },
        "shortcut": split["shortcut"],
        "COUT": found["cout"],
        "class cosine": found.get("class_cosine"),
        "minutes": row["seconds"]["training"] / 60.0,
    }


def _known(rivals: Iterable[Mapping[str, float | None]], name: str) -> list[float]:
    return [value for rival in rivals if (value := rival[name]) is not None]


def _apply(what: Any, one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else what(one, other)


def _medians(each: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for scores in each:
        for name, value in scores.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by experiment, objective and device, which differ in their seeds alone."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(key_of(row)[:3], []).append(row)
    return found


def verdicts(rows: Iterable[Row]) -> list[tuple[Group, str, float, str, bool]]:
    """Of each threshold: whose, which, the median, what was wanted, and whether it was met."""
    found = []
    for group, members in grouped(rows).items():
        known = _medians([summarise(row) for row in members])
        for name, (side, bound) in WANTED.get(group[:2], {}).items():
            if name in known:
                met = known[name] >= bound if side == "at least" else known[name] <= bound
                found.append((group, name, known[name], f"{side} {bound:g}", met))
    return found


def tables(rows: Iterable[Row]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Of each experiment and device: a header, and lines of cells for objectives and rivals."""
    groups = grouped(rows)
    found = {}
    for experiment, device in dict.fromkeys((e, d) for e, _, d in groups):
        places = {name: (experiment, name, device) for name in _OURS}
        here = {name: groups[place] for name, place in places.items() if place in groups}
        lines = {
            f"`{name}`, seeds: {len(members)}": _medians([summarise(row) for row in members])
            for name, members in here.items()
        }
        first = next(iter(here.values()))
        for rival in first[0]["found"]["rivals"]:
            each = [_scores(row["found"]["rivals"][rival]) for row in first]
            lines[rival.replace("_", " ")] = _medians(each)
        judges = sorted(
            {n for each in lines.values() for n in each if n.startswith("judge, class")}
        )
        columns = [*_SHOWN.get(experiment, ()), *_AREAS, "COUT", "class cosine", "PSNR", *judges]
        columns = [name for name in columns if any(name in each for each in lines.values())]
        cells = [
            [name, *(f"{each[c]:.3f}" if c in each else "" for c in columns)]
            for name, each in lines.items()
        ]
        found[f"{experiment}, {device}"] = (["explanation", *columns], cells)
    return found


def show(rows: list[Row]) -> None:
    """Print medians, and which thresholds were met and which were not."""
    console = Console(width=150, highlight=False, markup=False)
    for title, (header, lines) in tables(rows).items():
        table = Table(title=title)
        for column in header:
            table.add_column(column)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for group, name, value, wanted, met in verdicts(rows):
        verdict = "met" if met else "MISSED"
        console.print(f"{verdict}: {', '.join(group)}: {name} {value:.3f}, wanted {wanted}")


def markdown(rows: list[Row]) -> str:
    """The same as tables for the docs."""
    parts = []
    for title, (header, lines) in tables(rows).items():
        lines_of_cells = header, ["---"] * len(header), *lines
        parts += [f"**{title}**", "", *(_line(cells) for cells in lines_of_cells), ""]
    parts += ["| experiment | objective | device | number | median | wanted | |"]
    parts += ["|---|---|---|---|---|---|---|"]
    for group, name, value, wanted, met in verdicts(rows):
        cells = [*group, name, f"{value:.3f}", wanted, "met" if met else "**missed**"]
        parts.append(_line(cells))
    return "\n".join(parts)


def write_into(page: Path, made: str) -> None:
    """Put tables in the place of those that were made before, between two comments of a page.

    Raises:
        ValueError: If the page has no such place.
    """
    before, start, rest = page.read_text(encoding="utf-8").partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        raise ValueError(f"{page} has no place for tables: {_START} and {_END}.")
    page.write_text(f"{before}{_START}\n\n{made}\n\n{_END}{after}", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Take rows in, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "distinction.jsonl")
    parser.add_argument("--merge", type=Path, nargs="+", default=[])
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args(arguments)
    rows = merge(given.results, given.merge) if given.merge else read_rows(given.results)
    if given.docs:
        write_into(_PAGE, markdown(rows))
    else:
        show(rows)


if __name__ == "__main__":
    main()
