"""Areas under curves against scikit-learn's, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.runs.separation import (
    auroc,
    average_precision,
    chance_band,
    roc_curve,
    true_positive_rate,
)


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize(("few", "many"), [(1, 30), (30, 1), (40, 70)])
def test_areas_are_those_of_scikit_learn(digits: int, few: int, many: int) -> None:
    low = torch.randn(few, dtype=torch.float64).round(decimals=digits)
    high = (torch.randn(many, dtype=torch.float64) + 0.7).round(decimals=digits)
    scores, truth = torch.cat([low, high]), [0] * few + [1] * many
    assert auroc(low, high) == pytest.approx(metrics.roc_auc_score(truth, scores), rel=1e-12)
    assert average_precision(low, high) == pytest.approx(
        metrics.average_precision_score(truth, scores), rel=1e-12
    )
    wrong, found, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(low, high), (wrong, found), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs))
    for rate in (0.0, 0.01, 0.2):
        assert true_positive_rate(low, high, rate) == pytest.approx(
            found[wrong <= rate + 1e-12].max()
        )


def test_alike_groups_leave_the_band_in_one_of_twenty_cases() -> None:
    outside = 0
    for _ in range(400):
        low, high = torch.randn(30), torch.randn(50)
        outside += abs(auroc(low, high) - 0.5) > chance_band(30, 50)
    assert abs(outside / 400 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 400)
    with pytest.raises(InputError, match="both groups"):
        chance_band(0, 3)


def test_groups_that_cannot_be_compared_are_refused() -> None:
    some = torch.zeros(3)
    with pytest.raises(InputError, match="both groups"):
        auroc(some, some[:0])
    with pytest.raises(ShapeError, match="one number"):
        auroc(some, some[None])
    with pytest.raises(NonFiniteError, match="1 NaN"):
        auroc(some, torch.tensor([math.nan, 0.0]))
    with pytest.raises(InputError, match="rate"):
        true_positive_rate(some, some, 1.0)
