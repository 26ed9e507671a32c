"""How well a score tells planted points, or corrupted clouds, from the rest.

AUROC, AUPR and FPR95 are torchmetrics' own. What is added is that any real-valued score is allowed
(torchmetrics puts a sigmoid over scores outside [0, 1], where counts above 17 or so become one
value in float32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinarySpecificityAtSensitivity,
)

from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.runs.separation import auroc

__all__ = [
    "FalsePositiveRate95",
    "ScoreAUPR",
    "ScoreAUROC",
    "outlier_metrics",
    "separation",
]


def _unit(score: Tensor) -> Tensor:
    """Return the scores in (0, 1), order kept: x to (1 + x / (1 + |x|)) / 2 in float64."""
    bad = int((~score.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"scores hold {bad} NaN or infinite values.")
    wide = score.double()
    return (1.0 + wide / (1.0 + wide.abs())) / 2.0


class ScoreAUROC(BinaryAUROC):
    """torchmetrics' ``BinaryAUROC`` for scores of any range; higher means outlier."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add scores and labels (1: outlier) of the same shape."""
        super().update(_unit(preds), target)


class ScoreAUPR(BinaryAveragePrecision):
    """torchmetrics' ``BinaryAveragePrecision`` for scores of any range; higher means outlier."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add scores and labels (1: outlier) of the same shape."""
        super().update(_unit(preds), target)


class FalsePositiveRate95(BinarySpecificityAtSensitivity):
    """Lowest share of false alarms among thresholds that find 95 % of the outliers.

    Args:
        thresholds: None (exact, keeps every score) or a number of bins (constant memory).
        **kwargs: Passed to torchmetrics' ``Metric``.
    """

    higher_is_better = False

    def __init__(self, thresholds: int | None = None, **kwargs: Any) -> None:
        super().__init__(min_sensitivity=0.95, thresholds=thresholds, **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add scores and labels (1: outlier) of the same shape."""
        super().update(_unit(preds), target)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the rate, in [0, 1]."""
        specificity: Tensor = super().compute()[0]
        return 1.0 - specificity


def outlier_metrics(thresholds: int | None = None) -> MetricCollection:
    """Return AUROC, AUPR and FPR95 as one torchmetrics collection.

    Args:
        thresholds: None (exact, keeps every score) or a number of bins (constant memory).
    """
    return MetricCollection(
        {
            "AUROC": ScoreAUROC(thresholds=thresholds),
            "AUPR": ScoreAUPR(thresholds=thresholds),
            "FPR95": FalsePositiveRate95(thresholds=thresholds),
        },
        # Each class squashes its input itself; grouping would let one update stand for all three,
        # which is right here as well and three times as cheap.
        compute_groups=[["AUROC", "AUPR", "FPR95"]],
    )


def separation(clean: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the AUROC of each score at telling other clouds from clean ones.

    Above 0.5 the other clouds score higher; as far below, lower, which separates them as well if
    one knows so beforehand.

    Args:
        clean: Scores [B] of clean clouds by name, such as those of
            :func:`cmd_plugin.pointcloud.focus.unusual_scores`.
        other: Scores [B'] of the other clouds, by the same names.

    Raises:
        InputError: If names differ, or there are no clouds.
        ShapeError: If scores are not one for each cloud.
        NonFiniteError: If a score is NaN or infinite.
    """
    if clean.keys() != other.keys():
        raise InputError(f"clean has {sorted(clean)} and other {sorted(other)}: give the same.")
    return {name: auroc(clean[name], other[name]) for name in clean}
