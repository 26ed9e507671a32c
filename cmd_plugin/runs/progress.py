"""The one event by which every long job says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "ReportProgress"]


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        stage: What is being done now, for example "seed 1, epoch 4".
        done: Work done so far, in the job's own unit; fractions are allowed.
        total: Work of the whole job in that unit; None while it is not known.
        note: A short result to show beside the bar, for example "accuracy 0.912".
    """

    stage: str
    done: float
    total: float | None
    note: str = ""


ReportProgress = Callable[[Progress], None]
