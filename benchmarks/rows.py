"""Rows of results that many processes measure, one by one, and one file keeps."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["add_row_options", "measure_missing", "read_rows"]

Row = dict[str, Any]


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which rows are measured, on what, and where they are kept."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--data-root", default=os.environ.get("CMD_PLUGIN_DATA"))
    parser.add_argument("--quick", action="store_true", help="one seed, tiny, nothing is kept")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="rows to take over")
    parser.add_argument("--out", type=Path)


def read_rows(*paths: Path) -> list[Row]:
    """Return the rows of files in turn; of an experiment and seed the first that there is."""
    found: dict[tuple[str, int], Row] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            found.setdefault((row["experiment"], row["seed"]), row)
    return list(found.values())


def measure_missing(
    out: Path,
    wanted: Iterable[tuple[str, int]],
    measure: Callable[[str, int], Row],
    merge: Iterable[Path] = (),
    beside: Iterable[Path] = (),
) -> list[Row]:
    """Measure what no file has a row of, and write each row as soon as it is there.

    Args:
        out: The file.
        wanted: Experiments and seeds.
        measure: Returns the row of one.
        merge: Files of other processes, whose rows are taken over first.
        beside: Files of other machines, whose rows stay where they are.

    Returns:
        The rows of the file and of those beside it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out, *beside)
    known = {(row["experiment"], row["seed"]) for row in rows}
    with out.open("a", encoding="utf-8") as stream:

        def keep(row: Row) -> None:
            rows.append(row)
            known.add((row["experiment"], row["seed"]))
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()

        for row in read_rows(*merge):
            if (row["experiment"], row["seed"]) not in known:
                keep(row)
        for experiment, seed in wanted:
            if (experiment, seed) not in known:
                keep(measure(experiment, seed))
    return rows
