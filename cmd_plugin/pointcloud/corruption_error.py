r"""mCE, RmCE and mOA: how much accuracy corruptions cost, relative to a DGCNN.

Definitions: Ren, Pan, Liu (ICML 2022). With OA the overall accuracy, a mean over the five levels,

.. math:: CE_c = \frac{1 - OA_c}{1 - OA_c^{ref}}, \qquad
          RCE_c = \frac{OA_{clean} - OA_c}{OA_{clean}^{ref} - OA_c^{ref}}

and mCE, RmCE, mOA are their means over the seven corruptions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud.corruptions import CORRUPTIONS, LEVELS, Corruption
from cmd_plugin.pointcloud.names import ROUNDINGS, Rounding

__all__ = ["DGCNN_ACCURACY", "CorruptionError", "CorruptionErrors", "mean_corruption_error"]

DGCNN_ACCURACY: Mapping[str, float] = {
    "clean": 0.926,
    "scale": 0.906,
    "jitter": 0.684,
    "rotate": 0.785,
    "drop_global": 0.752,
    "drop_local": 0.793,
    "add_global": 0.705,
    "add_local": 0.725,
}
"""Overall accuracy on ModelNet-C of the DGCNN that has mCE 1, as its authors published it."""

_CLEAN = "clean"
_ROWS = (*CORRUPTIONS, _CLEAN)


@dataclass(frozen=True)
class CorruptionErrors:
    """The summary of a robustness table.

    Attributes:
        mce: Mean corruption error; 1 is the reference network, lower is better.
        rmce: Relative mean corruption error: of the accuracy lost, not of the error.
        moa: Mean overall accuracy over the corruptions, in [0, 1].
        clean: Overall accuracy on clean clouds, in [0, 1].
        accuracy: Overall accuracy of every corruption, mean over its levels.
        ce: Corruption error of every corruption.
        rce: Relative corruption error of every corruption.
    """

    mce: float
    rmce: float
    moa: float
    clean: float
    accuracy: dict[Corruption, float]
    ce: dict[Corruption, float]
    rce: dict[Corruption, float]


def mean_corruption_error(
    accuracy: Mapping[str, float | Sequence[float]],
    clean: float,
    *,
    rounding: Rounding = "official",
    reference: Mapping[str, float] = DGCNN_ACCURACY,
) -> CorruptionErrors:
    """Summarise accuracies under the seven corruptions.

    The denominators of ``scale`` are tiny: 0.1 % of accuracy moves its CE by 0.011 and its RCE by
    0.05, which is why the rounding has to be stated.

    Args:
        accuracy: For each of the seven corruptions its accuracy in [0, 1]: one number, already the
            mean over the levels, or one per level.
        clean: Accuracy on clean clouds in [0, 1].
        rounding: ``"official"`` rounds accuracies to three decimals, then the errors, then the
            means, as the published tables do; ``"exact"`` rounds nothing.
        reference: Accuracies of the network that shall have mCE 1, with the key ``"clean"``.

    Raises:
        InputError: If a corruption is missing or unknown, an accuracy lies outside [0, 1], or the
            reference makes no or no fewer errors under a corruption than without.
    """
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding must be {' or '.join(ROUNDINGS)}, got {rounding!r}.")

    def rounded(value: float) -> float:
        return round(value, 3) if rounding == "official" else value

    means = {name: _mean(name, values) for name, values in accuracy.items()}
    _check_names("accuracy", means, CORRUPTIONS)
    _check_names("reference", reference, _ROWS)
    base = rounded(_mean(_CLEAN, clean))
    result: dict[Corruption, float] = {name: rounded(means[name]) for name in CORRUPTIONS}
    ce, rce = {}, {}
    for name in CORRUPTIONS:
        error, lost = 1.0 - reference[name], reference[_CLEAN] - reference[name]
        if not (error > 0.0 and lost > 0.0):
            raise InputError(f"the reference must lose accuracy under {name}, or nothing compares.")
        ce[name] = rounded((1.0 - result[name]) / error)
        rce[name] = rounded((base - result[name]) / lost)

    def mean(values: Mapping[Corruption, float]) -> float:
        return rounded(math.fsum(values.values()) / len(values))

    return CorruptionErrors(mean(ce), mean(rce), mean(result), base, result, ce, rce)


def _mean(name: str, values: float | Sequence[float]) -> float:
    row: list[float] = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    if not row or not all(0.0 <= value <= 1.0 for value in row):  # NaN is no number of [0, 1]
        raise InputError(f"accuracy of {name!r} must be in [0, 1], one or one per level: {row}.")
    return math.fsum(row) / len(row)


def _check_names(what: str, given: Mapping[str, object], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise InputError(f"{what} {' and '.join(parts)}: it needs {', '.join(wanted)}.")


class CorruptionError(Metric):
    """torchmetrics form of :func:`mean_corruption_error`: counts hits cell by cell of the table.

    Update it with the clean predictions and those under every corruption and level; memory does not
    grow. ``compute()`` gives ``mCE``, ``RmCE``, ``mOA``, ``OA_clean`` and, for every corruption,
    ``OA_<name>``, ``CE_<name>`` and ``RCE_<name>`` as float64 scalars.

    Args:
        rounding: See :func:`mean_corruption_error`.
        reference: See :func:`mean_corruption_error`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    correct: Tensor
    seen: Tensor

    def __init__(
        self,
        rounding: Rounding = "official",
        reference: Mapping[str, float] = DGCNN_ACCURACY,
    ) -> None:
        super().__init__()
        self.rounding: Rounding = rounding
        self.reference = dict(reference)
        cells = torch.zeros(len(_ROWS), LEVELS, dtype=torch.int64)
        self.add_state("correct", cells.clone(), dist_reduce_fx="sum")
        self.add_state("seen", cells.clone(), dist_reduce_fx="sum")

    def update(
        self,
        preds: Tensor,
        target: Tensor,
        corruption: Corruption | Literal["clean"] = "clean",
        level: int = 0,
    ) -> None:
        """Count the hits of one batch.

        Args:
            preds: Scores [B, C], of which the largest counts, or labels [B].
            target: Labels [B], int64.
            corruption: What was done to these clouds, or ``"clean"``.
            level: 0 to 4; 0 for clean clouds.

        Raises:
            ShapeError: If shapes do not fit.
            InputError: If there is no such cell.
        """
        if target.ndim != 1 or preds.ndim not in (1, 2) or len(preds) != len(target):
            raise ShapeError(
                "preds must be [B, C] scores or [B] labels and target [B], got "
                f"{tuple(preds.shape)} and {tuple(target.shape)}."
            )
        if corruption not in _ROWS or not 0 <= level < (1 if corruption == _CLEAN else LEVELS):
            raise InputError(f"there is no corruption {corruption!r} at level {level}.")
        labels = preds.argmax(dim=1) if preds.ndim == 2 else preds
        cell = _ROWS.index(corruption), level
        self.correct[cell] += (labels == target).sum().to(self.correct.device)
        self.seen[cell] += len(target)

    def accuracy(self) -> dict[str, list[float]]:
        """Return the accuracy of every corruption level by level, and of ``"clean"``; NaN: none."""
        table = (self.correct.double() / self.seen).tolist()
        rows = dict(zip(_ROWS, table, strict=True))
        return {**rows, _CLEAN: rows[_CLEAN][:1]}

    def summary(self) -> CorruptionErrors:
        """Return the summary as plain numbers.

        Raises:
            InputError: If a cell of the table has not been seen.
        """
        accuracy = self.accuracy()
        empty = [name for name, row in accuracy.items() if any(math.isnan(cell) for cell in row)]
        if empty:
            raise InputError(f"no clouds were seen for every level of {', '.join(empty)}.")
        clean = accuracy.pop(_CLEAN)[0]
        return mean_corruption_error(
            accuracy, clean, rounding=self.rounding, reference=self.reference
        )

    def compute(self) -> dict[str, Tensor]:
        """Return the summary by name, float64 scalars.

        Raises:
            InputError: If a cell of the table has not been seen.
        """
        result = self.summary()
        named = {
            "mCE": result.mce,
            "RmCE": result.rmce,
            "mOA": result.moa,
            "OA_clean": result.clean,
            **{f"OA_{name}": value for name, value in result.accuracy.items()},
            **{f"CE_{name}": value for name, value in result.ce.items()},
            **{f"RCE_{name}": value for name, value in result.rce.items()},
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}
