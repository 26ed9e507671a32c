"""Scores of rows, a piece at a time: what columns there are, what they mean, and their values."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.clip import Whitening

__all__ = ["COLUMNS", "Scores", "columns_of", "score_rows", "write_rows"]

COLUMNS: dict[str, dict[str, str]] = {
    "row": {
        "meaning": "number of the row in the input, from 0",
    },
    "name": {
        "meaning": "path of the image inside its folder, or the caption; only where there are some",
    },
    "embedding_norm": {
        "formula": "||x||",
        "direction": "none: the length of the embedding as it came; 1 for all means that it was "
        "normalised, and then the likelihood is not the paper's",
    },
    "norm": {
        "formula": "||y||, y = (x - mean) @ matrix",
        "direction": "low is usual, high is rare",
    },
    "squared_norm": {
        "formula": "||y||^2, the squared Mahalanobis distance to the rows of the fit",
        "direction": "low is usual, high is rare",
    },
    "log_likelihood": {
        "formula": "-(r log(2 pi) + ||y||^2) / 2 in nats, r the number of directions",
        "direction": "high is usual, low is rare; a surrogate that ranks within one whitening and "
        "says nothing across models, modalities or whitenings",
    },
    "percentile": {
        "formula": "100 (1 + number of reference rows that are no likelier) / (1 + number of "
        "reference rows), of the leave-one-out scores of the fit",
        "direction": "in (0, 100]: 100 is the most usual, 1 is rarer than 99 % of the reference; "
        "no p-value",
    },
    "conformity": {
        "formula": "<x / ||x||, m>, m the mean of x / ||x|| over the rows of the fit: the mean "
        "cosine to them (of rows of the fit: to the others)",
        "direction": "in [-1, 1]: high is common, low is unique",
    },
}


@dataclass(frozen=True)
class Scores:
    """Scores of rows.

    Attributes:
        columns: By name, each [n] float64; NaN for rows that are not finite.
    """

    columns: dict[str, Tensor]


def columns_of(whitening: Whitening, unit_mean: Tensor | None) -> list[str]:
    """Names of the columns that can be computed, in order, without ``row`` and ``name``."""
    lacking = {
        "percentile": whitening.reference is None,
        "conformity": unit_mean is None,
    }
    return [name for name in list(COLUMNS)[2:] if not lacking.get(name)]


def score_rows(
    x: Tensor, whitening: Whitening, unit_mean: Tensor | None, fitted: int | None = None
) -> Scores:
    """Score rows.

    Args:
        x: Shape [n, d], float32 or float64.
        whitening: What scores them.
        unit_mean: Mean unit vector of the rows of the fit, [d] float64; None leaves conformity out.
        fitted: If these are rows of the fit, how many it had: each is then scored as if the fit
            were without it.
    """
    norms = torch.linalg.vector_norm(x.double(), dim=1)
    squared = whitening.squared_norm(x) if fitted is None else whitening.leave_one_out(x)
    squared = squared.double()
    found = {
        "embedding_norm": norms,
        "norm": squared.sqrt(),
        "squared_norm": squared,
        "log_likelihood": -0.5
        * (whitening.vectors.shape[1] * math.log(2.0 * math.pi) + squared),
    }
    if whitening.reference is not None:
        found["percentile"] = whitening.percentile(squared)
    if unit_mean is not None:
        cosines = (x.double() @ unit_mean) / norms
        found["conformity"] = (
            cosines if fitted is None else (fitted * cosines - 1.0) / (fitted - 1)
        )
    return Scores(found)


def write_rows(
    scores: Scores, first: int, names: Sequence[str] | None, kind: str
) -> str:
    """Return rows of a table as text.

    Args:
        scores: Their scores.
        first: Number of the first row.
        names: Of the rows; None if they have none.
        kind: ``"csv"``, without a header, or ``"jsonl"``; a value that is not finite is empty, or
            null.
    """
    values = [column.tolist() for column in scores.columns.values()]
    header = table_header(list(scores.columns), named=names is not None)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
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
