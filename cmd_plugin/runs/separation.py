"""How well one number tells two groups apart: areas under curves, exact, ties counted half."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["auroc", "average_precision", "chance_band", "roc_curve", "true_positive_rate"]


def auroc(low: Tensor, high: Tensor) -> float:
    """Return the chance that one of ``high`` is above one of ``low``, ties counted half.

    Args:
        low: [A] scores of the group that should score lower.
        high: [B] scores of the other.

    Raises:
        ShapeError: If they are not one number each.
        InputError: If a group is empty.
        NonFiniteError: If a score is NaN or infinite.
    """
    low, high = _checked(low, high)
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high, right=False)
    not_above = torch.searchsorted(ordered, high, right=True)
    # Whole numbers as far as they can be, so that no order of summation shows.
    return float((below + not_above).sum()) / (2.0 * len(low) * len(high))


def average_precision(low: Tensor, high: Tensor) -> float:
    """Return the mean precision over the ranks of ``high``, best scores first; ties are one rank.

    Args and errors are those of :func:`auroc`.
    """
    low, high = _checked(low, high)
    steps = torch.unique(high)
    found = len(high) - torch.searchsorted(high.sort().values, steps)
    wrong = len(low) - torch.searchsorted(low.sort().values, steps)
    gained = found - torch.cat([found[1:], found.new_zeros(1)])
    return float((gained.double() * found / (found + wrong)).sum() / len(high))


def true_positive_rate(low: Tensor, high: Tensor, false_positive_rate: float = 0.01) -> float:
    """Return the share of ``high`` above a limit that at most so large a share of ``low`` is above.

    Args:
        low: [A] scores.
        high: [B] scores.
        false_positive_rate: In [0, 1).

    Raises:
        InputError: If the rate is out of range, or as :func:`auroc`.
    """
    low, high = _checked(low, high)
    if not 0.0 <= false_positive_rate < 1.0:
        raise InputError(f"the false-positive rate must be in [0, 1), got {false_positive_rate}.")
    allowed = math.floor(false_positive_rate * len(low) + 1e-9)
    limit = low.sort(descending=True).values[allowed]
    return float((high > limit).double().mean())


def roc_curve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the false and the true positive rates over all limits, [K] float64 each, rising.

    Args and errors are those of :func:`auroc`, which is the area under this curve.
    """
    low, high = _checked(low, high)
    limits = torch.unique(torch.cat([low, high]))
    rates = []
    for scores in (low, high):
        reached = len(scores) - torch.searchsorted(scores.sort().values, limits)
        rates.append(torch.cat([reached.flip(0).new_zeros(1), reached.flip(0)]) / len(scores))
    return rates[0].double(), rates[1].double()


def chance_band(low: int, high: int, deviations: float = 1.96) -> float:
    """Return how far from .5 the AUROC of two groups alike gets by chance.

    Args:
        low: Number of scores of one group.
        high: Number of scores of the other.
        deviations: How many standard deviations; 1.96 for 95 of 100 pairs of groups.

    Raises:
        InputError: If a group is empty.
    """
    if min(low, high) < 1:
        raise InputError(f"both groups need a score, got {low} and {high}.")
    # The variance of the statistic of Mann and Whitney under the null hypothesis.
    return deviations * math.sqrt((low + high + 1) / (12.0 * low * high))


def _checked(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    for scores in (low, high):
        if scores.ndim != 1:
            raise ShapeError(f"scores must be one number each, got {tuple(scores.shape)}.")
        if not len(scores):
            raise InputError(f"both groups need a score, got {len(low)} and {len(high)}.")
        bad = int((~scores.isfinite()).sum())
        if bad:
            raise NonFiniteError(f"scores hold {bad} NaN or infinite values.")
    low, high = (scores.detach().double().cpu().contiguous() for scores in (low, high))
    return low, high
