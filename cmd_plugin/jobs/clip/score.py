"""Score embeddings, images or captions against a whitening, a piece at a time."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.clip import Whitening, score_rows
from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.jobs.clip.encode import Opened, open_input
from cmd_plugin.jobs.clip.fitting import Fitted, about_of, read_fitted
from cmd_plugin.jobs.clip.inputs import Rows
from cmd_plugin.jobs.clip.options import ScoreOptions
from cmd_plugin.jobs.clip.score_table import COLUMNS, table_header, write_rows
from cmd_plugin.runs.files import write_json
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.process import own_threads
from cmd_plugin.runs.result import Result

__all__ = ["run"]

_EXTREMES = 10


@make_job("clip score")
def run(job: Job, options: ScoreOptions) -> Result:
    """Score rows, and write a table of them.

    Returns:
        Metrics: number of ``rows`` and of those ``not_finite``; ``mean_log_likelihood``; the share
        ``below_5_percent`` of rows that are rarer than 95 % of the reference (of rows like those of
        the fit, 0.05; None without a reference); the ``mean_conformity``; the names and scores of
        the ``lowest`` and ``highest`` ten; the ``columns``. Data: the ``input`` and ``whitening``.

    Raises:
        InputError: If the input, the whitening or the folder cannot be used.
        ShapeError: If their dimensions differ.
    """
    with own_threads(options.threads):
        fitted = read_fitted(options.whitening)
        opened = open_input(job, options, options.input)
        rows = opened.file.single(options.modality)
        _require_fitting(rows, fitted.whitening, options)
        if not options.leave_one_out:
            _warn_of_own_rows(options, opened, fitted)
        found = _score(job, options, rows, fitted)
    data = {**opened.data, "modality": rows.modality, "whitening": str(options.whitening)}
    return job.finish(metrics=found, data=data)


def _score(job: Job, options: ScoreOptions, rows: Rows, fitted: Fitted) -> dict[str, Any]:
    whitening, statistics = fitted.whitening, fitted.statistics
    own = options.leave_one_out
    fitted_rows = whitening.rows + (0 if statistics is None else statistics.skipped)
    if own and len(rows) != fitted_rows:
        raise InputError(
            f"--leave-one-out is for the rows of the fit, which were {fitted_rows}, and "
            f"{options.input} holds {len(rows)}: leave it out."
        )
    unit_mean = None if statistics is None else statistics.unit_mean
    parts, found = [], []
    for number, start in enumerate(range(0, len(rows), options.rows)):
        job.report("scoring", start, len(rows))
        part = rows.between(start, min(start + options.rows, len(rows)))
        path = job.folder.state(f"scores-{number:06d}.txt")

        def work(part: Rows = part, path: Path = path) -> dict[str, Any]:
            scores = score_rows(part.all(), whitening, unit_mean, leave_one_out=own)
            text = write_rows(scores, part.first, part.names, options.format)
            job.folder.write(path, lambda file: file.write_text(text, encoding="utf-8"))
            return {"columns": list(scores), **_summary(part, scores)}

        found.append(job.stage(f"scores-{number:06d}", work))
        parts.append(path)
    header = table_header(found[0]["columns"], named=rows.names is not None)
    _join(job, parts, header, options.format)
    about = {name: COLUMNS[name] for name in header}
    write_json(job.folder.path("columns.json"), {"columns": about, **_of_whitening(whitening)})
    return {**_total(found), "columns": header}


def _summary(part: Rows, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    likelihood = scores["log_likelihood"]
    good = likelihood.isfinite()
    order = torch.argsort(likelihood[good], stable=True)
    numbers = good.nonzero().flatten()[order]
    ends = {
        "lowest": numbers[:_EXTREMES].tolist(),
        "highest": numbers.flip(0)[:_EXTREMES].tolist(),
    }

    def total(name: str) -> float | None:
        column = scores.get(name)
        return None if column is None else float(column[good].sum())

    percentile = scores.get("percentile")
    return {
        "rows": len(likelihood),
        "finite": int(good.sum()),
        "log_likelihood": total("log_likelihood"),
        "conformity": total("conformity"),
        "below": None if percentile is None else int((percentile[good] <= 5.0).sum()),
        **{
            name: [[float(likelihood[row]), part.first + row, part.name_of(row)] for row in chosen]
            for name, chosen in ends.items()
        },
    }


def _total(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows, finite = (sum(part[name] for part in found) for name in ("rows", "finite"))
    if not finite:
        raise InputError("no row of the input is finite: there is nothing to score.")

    def mean(name: str) -> float | None:
        values = [part[name] for part in found]
        return None if None in values else sum(values) / finite

    def named(row: Sequence[Any]) -> dict[str, Any]:
        return {"row": row[1], "name": row[2], "log_likelihood": row[0]}

    lowest = heapq.nsmallest(_EXTREMES, (row for part in found for row in part["lowest"]))
    highest = heapq.nlargest(_EXTREMES, (row for part in found for row in part["highest"]))
    return {
        "rows": rows,
        "not_finite": rows - finite,
        "mean_log_likelihood": mean("log_likelihood"),
        "mean_conformity": mean("conformity"),
        "below_5_percent": mean("below"),
        "lowest": [named(row) for row in lowest],
        "highest": [named(row) for row in highest],
    }


def _join(job: Job, parts: Sequence[Path], header: Sequence[str], kind: str) -> None:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            if kind == "csv":
                stream.write(",".join(header) + "\n")
            for part in parts:
                stream.write(part.read_text(encoding="utf-8"))

    job.folder.write(job.folder.path(f"scores.{kind}"), write)


def _of_whitening(whitening: Whitening) -> dict[str, Any]:
    return {
        "whitening": {
            "rows": whitening.rows,
            "dimension": whitening.dim,
            "directions": whitening.vectors.shape[1],
            "rank": whitening.rank,
            "floored": whitening.floored,
            "shrinkage": whitening.shrinkage,
            "intensity": whitening.intensity,
            "normalize": whitening.normalize,
            "about": dict(whitening.about),
        }
    }


def _require_fitting(rows: Rows, whitening: Whitening, options: ScoreOptions) -> None:
    if rows.dimension != whitening.dim:
        raise ShapeError(
            f"{options.input} has rows of {rows.dimension} values and {options.whitening} is of "
            f"{whitening.dim}: score embeddings of the same encoder."
        )
    ours, theirs = about_of(rows), whitening.about
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            warnings.warn(
                f"the rows have {name} {ours[name]!r} and the rows of the fit {theirs[name]!r}: "
                "their scores do not compare.",
                stacklevel=2,
            )


def _warn_of_own_rows(options: ScoreOptions, opened: Opened, fitted: Fitted) -> None:
    """Say that rows of the fit look likelier than they are; percentiles are of others."""
    data, chosen = fitted.result.get("data", {}), fitted.result.get("options", {})
    same = (
        str(data.get("input")) == opened.data["input"]
        and chosen.get("modality") == options.modality
    )
    if same:
        warnings.warn(
            "these are rows of the fit, which look likelier than new ones: --leave-one-out scores "
            "each as if the fit were without it.",
            stacklevel=2,
        )
