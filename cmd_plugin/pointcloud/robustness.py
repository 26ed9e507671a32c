"""The robustness table: accuracy of several defences under seven corruptions at five levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.pointcloud.clouds import PointClouds
from cmd_plugin.pointcloud.corruption_error import CorruptionError, CorruptionErrors
from cmd_plugin.pointcloud.corruptions import (
    CORRUPTIONS,
    LEVELS,
    corrupt,
    shuffle_points,
)
from cmd_plugin.pointcloud.diversity import Diversity, EnsembleDiversity
from cmd_plugin.pointcloud.files import load_hdf5
from cmd_plugin.pointcloud.names import Rounding

__all__ = ["SETS", "RobustnessReport", "corrupted_sets", "evaluate_corruptions", "released_sets"]

SETS = 1 + len(CORRUPTIONS) * LEVELS
"""How many sets a table is made of: the clean one, and seven corruptions at five levels."""

CorruptedSet = tuple[str, int, PointClouds]
Panel = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
EVERYTHING = "all"


@dataclass(frozen=True)
class RobustnessReport:
    """What an evaluation found.

    Attributes:
        summaries: mCE, RmCE, mOA and errors of every row.
        accuracy: Of every row, accuracy level by level under every corruption, and ``"clean"``.
        diversity: Of every row that votes: diversity on clean clouds, under every corruption (its
            levels together), and over ``"all"`` of them.
        clouds: Number of clouds in each of the 36 sets.
        seed: Of the shuffles.
    """

    summaries: dict[str, CorruptionErrors]
    accuracy: dict[str, dict[str, list[float]]]
    diversity: dict[str, dict[str, Diversity]]
    clouds: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON; undefined measures are None."""
        return {
            "clouds": self.clouds,
            "seed": self.seed,
            "methods": {
                name: {**asdict(self.summaries[name]), "levels": self.accuracy[name]}
                for name in self.summaries
            },
            "diversity": {
                name: {what: _plain(found) for what, found in rows.items()}
                for name, rows in self.diversity.items()
            },
        }


def _plain(found: Diversity) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if value == value else None  # NaN is no JSON

    views = list(dict.fromkeys(found.views))
    pairs = [
        (first, second)
        for place, first in enumerate(views)
        for second in views[place:]
        if first != second or found.views.count(first) > 1
    ]
    return {
        "ensemble_accuracy": found.ensemble_accuracy,
        "mean_member_accuracy": found.mean_accuracy,
        "gap": found.gap,
        "member_brier": found.member_brier,
        "ambiguity": found.ambiguity,
        "accuracy": {
            view: [
                float(value)
                for value, name in zip(found.accuracy, found.views, strict=True)
                if name == view
            ]
            for view in views
        },
        "pairs": {
            f"{first} and {second}": {
                key: number(value) for key, value in found.between(first, second).items()
            }
            for first, second in pairs
        },
        "overall": {key: number(value) for key, value in found.overall().items()},
    }


def corrupted_sets(data: PointClouds, *, seed: int = 0) -> Iterator[CorruptedSet]:
    """Yield the clean set and its 35 corrupted versions, one at a time.

    This is "ModelNet-C-style, seed s" and not the released ModelNet-C, whose files are another
    source for :func:`evaluate_corruptions`: yield (corruption, level, clouds) for each of them.

    Args:
        data: Clean clouds in the unit ball.
        seed: Of the corruptions.

    Yields:
        (name of the corruption or ``"clean"``, level, clouds).
    """
    yield "clean", 0, data
    for corruption in CORRUPTIONS:
        for level in range(LEVELS):
            points = corrupt(data.points, corruption, level, seed=seed)
            yield corruption, level, PointClouds(points, data.labels, data.classes, data.name)


def released_sets(folder: str | Path, classes: Sequence[str]) -> Iterator[CorruptedSet]:
    """Return the clean and the 35 corrupted sets of the released ModelNet-C, read one at a time.

    Args:
        folder: Where ``clean.h5``, ``scale_0.h5``, ..., ``dropout_local_4.h5`` lie.
        classes: Class names, in the order of the labels.

    Returns:
        Yields (name of the corruption or ``"clean"``, level, clouds).

    Raises:
        InputError: If a file is missing; while they are read, if one is damaged.
        MissingDependency: While they are read, if h5py is not installed.
    """
    root = Path(folder)
    places = [("clean", 0, root / "clean.h5")]
    for corruption in CORRUPTIONS:
        released = corruption.replace("drop_", "dropout_")
        places += [(corruption, n, root / f"{released}_{n}.h5") for n in range(LEVELS)]
    for _, _, path in places:
        if not path.is_file():
            raise InputError(f"there is no file {path}: give the folder of all {SETS} files.")
    return (
        (corruption, level, load_hdf5([path], classes=classes, name="ModelNet-C"))
        for corruption, level, path in places
    )


@torch.no_grad()
def evaluate_corruptions(
    panel: Panel,
    sets: Iterable[CorruptedSet],
    *,
    views: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    rounding: Rounding = "official",
    progress: Callable[[int, int], None] | None = None,
) -> RobustnessReport:
    """Fill the table, every set once, in one pass for all rows.

    Points are shuffled first: published files, like :func:`cmd_plugin.pointcloud.corrupt`, put
    added points last.

    Args:
        panel: Maps (clouds [B, N, 3], sample numbers [B]) to the logits of every row of the table,
            by name: [B, C], or [B, M, C] for M members that vote by their mean.
        sets: The clean and all 35 corrupted sets, see :func:`corrupted_sets`.
        views: For rows that vote, the view of every member: turns the diversity analysis on.
        batch_size: Clouds in a batch.
        seed: Of the shuffles.
        rounding: See :func:`cmd_plugin.pointcloud.mean_corruption_error`.
        progress: Called with (sets done, 36) after each.

    Raises:
        InputError: If a set is missing, or the sets differ in size.
        NonFiniteError: If a row's logits are NaN or infinite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    tables: dict[str, CorruptionError] = {}
    spread: dict[str, dict[str, EnsembleDiversity]] = {name: {} for name in views or {}}
    sizes: set[int] = set()
    for number, (corruption, level, data) in enumerate(sets, 1):
        sizes.add(len(data))
        for start in range(0, len(data), batch_size):
            index = torch.arange(start, min(len(data), start + batch_size))
            points = shuffle_points(data.points[index], seed=seed, index=index)
            labels = data.labels[index]
            for name, logits in panel(points, index).items():
                if not bool(logits.isfinite().all()):
                    raise NonFiniteError(
                        f"{name}: logits under {corruption} {level} are not finite."
                    )
                vote = logits.mean(dim=1) if logits.ndim == 3 else logits
                table = tables.setdefault(name, CorruptionError(rounding))
                table.update(vote, labels, corruption, level)  # type: ignore[arg-type]
                if name in spread:
                    for what in (corruption, EVERYTHING):
                        measure = spread[name].setdefault(what, _diversity(views, name))
                        measure.update(logits, labels)
        if progress is not None:
            progress(number, SETS)
    if len(sizes) != 1:
        raise InputError(f"all sets must hold the same clouds, their sizes are {sorted(sizes)}.")
    return RobustnessReport(
        {name: table.summary() for name, table in tables.items()},
        {name: table.accuracy() for name, table in tables.items()},
        {
            name: {what: measure.summary() for what, measure in rows.items()}
            for name, rows in spread.items()
        },
        sizes.pop(),
        seed,
    )


def _diversity(views: Mapping[str, Sequence[str]] | None, name: str) -> EnsembleDiversity:
    return EnsembleDiversity((views or {})[name])
