"""Drift between two sets: an exact test under the null, and a classifier that is not fooled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmd_plugin.clip import domain_auc, mmd_test
from cmd_plugin.errors import InputError, ShapeError


def test_the_statistic_is_the_unbiased_estimate() -> None:
    a, b = torch.randn(9, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64) + 0.3

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * 1.5**2)).exp()

    kaa, kbb = kernel(a, a), kernel(b, b)
    inside = (kaa.sum() - kaa.trace()) / (9 * 8) + (kbb.sum() - kbb.trace()) / (7 * 6)
    expected = float(inside - 2.0 * kernel(a, b).mean())
    found = mmd_test(a, b, bandwidth=1.5, permutations=19)
    assert found.statistic == pytest.approx(expected)
    assert found.rows == (9, 7)


def test_the_bandwidth_is_the_median_distance() -> None:
    x = torch.randn(30, 4, dtype=torch.float64)
    expected = float(torch.pdist(x).square().median().sqrt())
    assert mmd_test(x[:10], x[10:], permutations=19).bandwidth == pytest.approx(expected)


def test_a_moved_set_is_found_and_equal_seeds_agree() -> None:
    a, b = torch.randn(80, 6), torch.randn(80, 6) + 0.6
    found = mmd_test(a, b, permutations=199)
    assert found.p_value == 1 / 200
    assert found == mmd_test(a, b, permutations=199)
    assert domain_auc(a, b).auc > 0.8


def test_alarms_under_the_null_keep_the_level() -> None:
    x = torch.randn(120, 8) * torch.rand(120, 1).exp()
    alarms = 0
    for seed in range(200):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
        found = mmd_test(x[order[:60]], x[order[60:]], permutations=99, seed=1000 + seed)
        alarms += found.p_value <= 0.05
    assert alarms <= 14  # 7 %


def test_a_classifier_finds_nothing_in_halves_of_one_set() -> None:
    x = torch.randn(120, 200)
    found = domain_auc(x[:60], x[60:])
    assert abs(found.auc - 0.5) < 0.12  # spread of an AUC of 60 + 60 rows: .053
    assert len(found.folds) == 5
    assert found.auc == pytest.approx(sum(found.folds) / 5)


def test_two_domains_on_disk_differ(stored: Callable[[str], Tensor]) -> None:
    photos, coco = stored("image_b16_photos1000"), stored("image_b16_coco159")
    found = mmd_test(photos, coco, limit=300, permutations=99)
    assert found.p_value == 0.01
    assert found.rows == (300, 159)
    assert domain_auc(photos[::3], coco).auc > 0.8


def test_sets_that_cannot_be_compared_are_refused() -> None:
    x = torch.randn(20, 3)
    with pytest.raises(InputError, match="permutations must be at least 19"):
        mmd_test(x, x, permutations=10)
    with pytest.raises(InputError, match="most rows of a and b are equal"):
        mmd_test(torch.ones(5, 3), torch.ones(5, 3))
    with pytest.raises(ShapeError, match="of one model"):
        mmd_test(x, x[:, :2])
    with pytest.raises(InputError, match="folds"):
        domain_auc(x, x, folds=1)
    with pytest.raises(InputError, match="b has 3 rows"):
        domain_auc(x, x[:3])
