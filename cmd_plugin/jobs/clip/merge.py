"""Make one whitening of several: the same as one fit of all their rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cmd_plugin.clip import GaussianStatistics
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip.fitting import (
    STATISTICS,
    WHITENING,
    describe_fit,
    fit_whitening,
    read_json_if_any,
)
from cmd_plugin.jobs.clip.inputs import Rows, open_embeddings
from cmd_plugin.jobs.clip.options import MergeOptions
from cmd_plugin.runs.job import Job, make_job
from cmd_plugin.runs.result import RESULT, Result

__all__ = ["run"]

_EMBEDDINGS = "embeddings.npy"


class _Part(NamedTuple):
    """One fit: its statistics, what it was fitted on, and the rows if they are still there."""

    path: Path
    statistics: GaussianStatistics
    origin: tuple[str, int] | None
    rows: Rows | None


@make_job("clip merge")
def run(job: Job, options: MergeOptions) -> Result:
    """Merge the statistics of several fits, and fit a whitening to all of them.

    Returns:
        Metrics as of ``clip fit``; ``in_sample`` and ``leave_one_out`` are None where the
        embeddings are not there any more, and there are no percentiles then. Data: the ``inputs``.

    Raises:
        InputError: If an input is no fit, or two are of the same rows.
        StateMismatch: If they are of different features.
    """
    parts = []
    for number, path in enumerate(options.inputs):
        job.report("reading", number, len(options.inputs))
        parts.append(_read(Path(path).expanduser()))
    _refuse_repeated(parts)
    metrics = job.stage("whitening", lambda: _merge(job, options, parts))
    return job.finish(
        metrics=metrics,
        data={"inputs": [str(part.path) for part in parts], "rows": metrics["rows"]},
    )


def _merge(job: Job, options: MergeOptions, parts: Sequence[_Part]) -> dict[str, Any]:
    first, *others = (part.statistics for part in parts)
    for other in others:
        first.merge(other)
    rows = [part.rows for part in parts if part.rows is not None]
    if len(rows) < len(parts):
        lacking = next(part.path for part in parts if part.rows is None)
        warnings.warn(
            f"the embeddings behind {lacking} are not there: this whitening has no leave-one-out "
            "reference, and scores get no percentiles.",
            stacklevel=2,
        )
        rows = []
    whitening = fit_whitening(first, options, rows)
    first.save(job.folder.path(STATISTICS))
    whitening.save(job.folder.path(WHITENING))
    return describe_fit(first, whitening, rows)


def _read(path: Path) -> _Part:
    file = path / STATISTICS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there are no statistics {file}: give a folder of `clip fit`.")
    statistics = GaussianStatistics.load(file)
    result = read_json_if_any(file.with_name(RESULT)) if path.is_dir() else {}
    data, options = result.get("data", {}), result.get("options", {})
    if not isinstance(data.get("input"), str):
        return _Part(path, statistics, None, None)
    origin = (data["input"], int(data.get("first_row", -1)))
    shard = options.get("shard")
    if data.get("kind") not in ("embeddings", "pairs"):
        origin = (f"{origin[0]} {shard}", 0)
    return _Part(path, statistics, origin, _rows(path, data, statistics, options))


def _rows(
    path: Path, data: dict[str, Any], statistics: GaussianStatistics, options: dict[str, Any]
) -> Rows | None:
    """The rows of a fit, if they can still be read and are as many as they were."""
    encoded = path / _EMBEDDINGS
    try:
        if encoded.is_file():
            rows = open_embeddings(encoded).single(None)
        else:
            start = int(data["first_row"])
            whole = open_embeddings(data["input"]).single(options.get("modality"))
            rows = whole.between(start, min(start + int(data["rows"]), len(whole)))
    except (InputError, KeyError, TypeError):
        return None
    fits = len(rows) == statistics.rows + statistics.skipped and rows.dimension == statistics.dim
    return rows if fits else None


def _refuse_repeated(parts: Sequence[_Part]) -> None:
    seen: dict[tuple[str, int], Path] = {}
    for part in parts:
        if part.origin is None:
            continue
        before = seen.setdefault(part.origin, part.path)
        if before is not part.path:
            raise InputError(
                f"{before} and {part.path} are fits of the same rows, which would count twice: "
                "leave one out."
            )
