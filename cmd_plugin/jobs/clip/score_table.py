"""Scores as rows of text: a table, or JSON a line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cmd_plugin.clip import SCORES

__all__ = ["COLUMNS", "table_header", "write_rows"]

COLUMNS: dict[str, dict[str, str]] = {
    "row": {"meaning": "number of the row in the input, from 0"},
    "name": {"meaning": "path of the image inside its folder, or the caption"},
    **SCORES,
}
"""What every column means."""


def write_rows(
    scores: Mapping[str, Tensor], first: int, names: Sequence[str] | None, kind: str
) -> str:
    """Return rows of a table as text.

    Args:
        scores: Each [n], by name of the column.
        first: Number of the first row.
        names: Of the rows; None if they have none.
        kind: ``"csv"``, without a header, or ``"jsonl"``; a value that is not finite is empty, or
            null.
    """
    header = table_header(list(scores), named=names is not None)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    values = (column.tolist() for column in scores.values())
    for place, row in enumerate(zip(*values, strict=True)):
        cells: list[Any] = [first + place]
        if names is not None:
            cells.append(names[place])
        cells += [value if math.isfinite(value) else None for value in row]
        if kind == "csv":
            writer.writerow(cells)
        else:
            line = json.dumps(dict(zip(header, cells, strict=True)), ensure_ascii=False)
            stream.write(f"{line}\n")
    return stream.getvalue()


def table_header(columns: Sequence[str], *, named: bool) -> list[str]:
    """Names of all columns."""
    return ["row", *(["name"] if named else []), *columns]
