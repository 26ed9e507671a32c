"""From rows on disk to statistics, and from these to a whitening with its reference scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.clip import GaussianStatistics, Whitening
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.clip.inputs import Rows
from cmd_plugin.jobs.clip.options import WhiteningOptions
from cmd_plugin.runs.job import Job
from cmd_plugin.runs.result import RESULT, finite

__all__ = [
    "STATISTICS",
    "WHITENING",
    "Fitted",
    "about_of",
    "describe_fit",
    "fit_whitening",
    "gather",
    "read_fitted",
    "shrinkage_of",
    "spread_rows",
]

WHITENING = "whitening.safetensors"
STATISTICS = "statistics.safetensors"

_PIECE = 16384
_REFERENCE = 16384  # rows whose leave-one-out scores are the reference, at most
_COMMON = ("encoder", "weights", "encoder_dtype", "preprocessing")


def about_of(rows: Rows) -> dict[str, str]:
    """What the rows of a fit have in common, text by name; of other things they do not merge."""
    known = {name: rows.about[name] for name in _COMMON if rows.about and name in rows.about}
    return known if rows.modality is None else {**known, "modality": rows.modality}


def gather(job: Job, rows: Rows, normalize: str, before: float = 0, total: float = 0) -> Any:
    """Return the statistics of rows, read a piece at a time.

    Args:
        job: Told how far it is.
        rows: The rows.
        normalize: ``"raw"`` or ``"l2"``.
        before: What is done already of ``total``.
        total: All rows that this job gathers; those of ``rows`` if 0.
    """
    statistics = GaussianStatistics(
        rows.dimension,
        normalize=normalize,  # type: ignore[arg-type]
        about=about_of(rows),
    )
    done = before
    for piece in rows.pieces(_PIECE):
        job.report("gathering statistics", done, total or len(rows))
        statistics.update(piece)
        done += len(piece)
    return statistics


def shrinkage_of(text: str) -> Any:
    """A shrinkage as the command line writes it, as the method takes it."""
    return text if text[:1].isalpha() else float(text)


def fit_whitening(
    statistics: GaussianStatistics, options: WhiteningOptions, sources: Sequence[Rows]
) -> Whitening:
    """Fit a whitening, and take leave-one-out scores of rows of the fit as its reference.

    Args:
        statistics: Of the rows.
        options: How to fit.
        sources: The rows themselves; if empty, the whitening has no reference.

    Raises:
        InputError: If there are too few rows.
    """
    fitted = Whitening.fit(
        statistics,
        options.basis,  # type: ignore[arg-type]
        shrinkage=shrinkage_of(options.shrinkage),
        floor=options.floor,
    )
    if not sources or not fitted.leaves_one_out:
        return fitted
    return fitted.calibrate(spread_rows(sources, _REFERENCE))


def spread_rows(sources: Sequence[Rows], most: int) -> Tensor:
    """Return at most so many rows [n, d], evenly spread over all sources together."""
    every = max(1, -(-sum(map(len, sources)) // most))
    return torch.cat(list(_every(sources, every)))


def _every(sources: Sequence[Rows], every: int) -> Iterator[Tensor]:
    first = 0  # number of the piece's first row among all
    for rows in sources:
        for piece in rows.pieces(_PIECE):
            yield piece[(-first) % every :: every]
            first += len(piece)


def describe_fit(
    statistics: GaussianStatistics, whitening: Whitening, sources: Sequence[Rows]
) -> dict[str, Any]:
    """What is to be said of a fit, as JSON types."""
    largest, smallest = (float(whitening.eigenvalues[place]) for place in (0, -1))
    found: dict[str, Any] = {
        "rows": statistics.rows,
        "skipped_rows": statistics.skipped,
        "dimension": whitening.dim,
        "rank": whitening.rank,
        "floored": whitening.floored,
        "shrinkage": whitening.shrinkage,
        "intensity": whitening.intensity,
        "condition": finite(largest / smallest) if smallest > 0 else None,
        "mean_norm": statistics.mean_norm,
        "mean_conformity": _mean_conformity(statistics),
        "in_sample": None,
        "leave_one_out": None,
    }
    if whitening.reference is not None:
        inside = whitening.squared_norm(spread_rows(sources, _REFERENCE))
        found["in_sample"] = float(inside[inside.isfinite()].double().mean())
        found["leave_one_out"] = float(whitening.reference.mean())
    return found


def _mean_conformity(statistics: GaussianStatistics) -> float | None:
    """Mean cosine of two different rows."""
    count, squared = statistics.rows, float(statistics.unit_mean.square().sum())
    return (count * squared - 1.0) / (count - 1) if count > 1 else None


class Fitted(NamedTuple):
    """What ``clip fit`` or ``clip merge`` left.

    Attributes:
        whitening: The whitening.
        statistics: The statistics beside it; None if there are none.
        result: The result.json beside it; empty if there is none.
    """

    whitening: Whitening
    statistics: GaussianStatistics | None
    result: Mapping[str, Any]


def read_fitted(path: str | Path) -> Fitted:
    """Read a fit: its folder, or a whitening alone, with what lies beside it.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    path = Path(path).expanduser()
    file = path / WHITENING if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no whitening {file}: give the folder of `clip fit`.")
    beside, result = file.with_name(STATISTICS), file.with_name(RESULT)
    whitening = Whitening.load(file)
    statistics = GaussianStatistics.load(beside) if beside.is_file() else None
    if statistics is not None and statistics.dim != whitening.dim:
        raise InputError(
            f"{beside} does not belong to {file}: keep what `clip fit` wrote together."
        )
    return Fitted(whitening, statistics, read_json_if_any(result))


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
