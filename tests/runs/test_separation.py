"""Areas under curves against scikit-learn's, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.runs.separation import auroc, average_precision, true_positive_rate


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize(("few", "many"), [(1, 30), (30, 1), (40, 70)])
def test_areas_are_those_of_scikit_learn(digits: int, few: int, many: int) -> None:
    low = torch.randn(few, dtype=torch.float64).round(decimals=digits)
    high = (torch.randn(many, dtype=torch.float64) + 0.7).round(decimals=digits)
    scores, truth = torch.cat([low, high]), [0] * few + [1] * many
    assert auroc(low, high) == pytest.approx(roc_auc_score(truth, scores), rel=1e-12)
    assert average_precision(low, high) == pytest.approx(
        average_precision_score(truth, scores), rel=1e-12
    )
    wrong, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    for rate in (0.0, 0.01, 0.2):
        assert true_positive_rate(low, high, rate) == pytest.approx(
            found[wrong <= rate + 1e-12].max()
        )


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
