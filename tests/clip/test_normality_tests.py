"""Tests of normality against SciPy, and what grouping does to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cmd_plugin.clip import Whitening, normality
from cmd_plugin.errors import InputError


def test_both_statistics_are_those_of_scipy() -> None:
    x = torch.randn(80, 4, dtype=torch.float64)
    x[:, 1] = x[:, 1].exp()
    found = normality(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = [float(stats.anderson(column, "norm").statistic) for column in x.T.numpy()]
    assert found.anderson.tolist() == pytest.approx(expected, rel=1e-9)
    expected = [float(stats.normaltest(column).pvalue) for column in x.T.numpy()]
    assert found.dagostino.tolist() == pytest.approx(expected, rel=1e-9)
    assert (found.group_size, found.groups) == (80, 1)
    assert found.anderson_pass == 0.75
    assert found.dagostino_pass == 0.75


def test_groups_are_averaged_and_the_split_is_seeded() -> None:
    x = torch.randn(130, 3, dtype=torch.float64)
    found = normality(x, 40, seed=5)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(5))
    parts = [normality(x[order][start : start + 40]) for start in (0, 40, 80)]
    mean = torch.stack([part.anderson for part in parts]).mean(dim=0)
    assert torch.allclose(found.anderson, mean)
    assert (found.group_size, found.groups) == (40, 3)


def test_normal_data_pass_and_their_mean_statistic_is_known() -> None:
    found = normality(torch.randn(2000, 50), 250)
    assert float(found.anderson.mean()) == pytest.approx(0.387, abs=0.02)  # 400 tests, spread .23
    assert found.anderson_pass == 1.0


def test_small_groups_hide_what_the_whole_shows(stored: Callable[[str], Tensor]) -> None:
    x = stored("image_b16_photos1000")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few rows for so many features
        white = Whitening.fit(x).transform(x)
    whole, grouped = normality(white), normality(white, 250)
    assert whole.anderson_pass < grouped.anderson_pass


def test_samples_that_cannot_be_tested_are_refused() -> None:
    x = torch.randn(60, 3)
    for size in (19, 61):
        with pytest.raises(InputError, match="group_size must be 20 to 60"):
            normality(x, size)
    with pytest.raises(InputError, match="at least 20"):
        normality(x[:19])
    x[:, 2] = 1.0
    with pytest.raises(InputError, match="1 features do not vary"):
        normality(x)


def test_far_tails_do_not_become_infinite() -> None:
    x = torch.zeros(4000, 1, dtype=torch.float64)
    x[0] = 1.0
    assert np.isfinite(float(normality(x).anderson))
