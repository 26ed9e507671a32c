"""The p-value of a set: uniform without members, small with them, refused where pixels tell."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest
from sklearn.linear_model import Ridge
from torch import Tensor

from cmd_plugin.diffusion import (
    infer_membership,
    membership_power,
    pixel_separation,
    refuse_unlike,
)
from cmd_plugin.diffusion.suspects import _folds, _joined, _smoother
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError


def groups(lead: float, count: int = 40, features: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, count, features, generator=generator)
    both[0, :, :2] += lead
    return both[0], both[1]


def test_without_members_p_values_are_uniform() -> None:
    found = [
        infer_membership(*groups(0.0, 15, seed=seed), permutations=99, seed=seed).p_value
        for seed in range(200)
    ]
    assert kstest(found, "uniform").statistic < 1.63 / math.sqrt(200) + 0.01
    assert sum(p <= 0.05 for p in found) / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_members_are_found_and_the_more_the_surer() -> None:
    suspects, controls = groups(0.8, 80)
    found = infer_membership(suspects, controls, permutations=999)
    assert found.p_value == 1e-3
    assert found.auroc > 0.7
    assert (found.suspects, found.controls) == (80, 80)
    rates = membership_power(suspects, controls, (10, 30, 70, 200), draws=20, permutations=99)
    assert rates[200] is None
    assert rates[10] is not None
    assert rates[30] is not None
    assert rates[70] is not None
    assert rates[10] < rates[70]
    assert rates[30] > 0.6
    assert rates[70] == 1.0
    again = infer_membership(suspects, controls, permutations=999)
    assert again == found


def test_scores_are_those_of_a_ridge_regression_that_never_saw_the_image() -> None:
    table, labels = _joined(*groups(0.5, 12))
    fold = _folds(labels, 3, torch.Generator().manual_seed(0))
    assert all(int((fold[labels == k] == part).sum()) == 4 for k in (0, 1) for part in range(3))
    scores = _smoother(table, fold, 0.5) @ labels
    for part in range(3):
        known, rest = fold != part, fold == part
        ridge = Ridge(alpha=0.5 * int(known.sum())).fit(table[known].numpy(), labels[known].numpy())
        expected = ridge.predict(table[rest].numpy()) - float(labels[known].mean())
        assert scores[rest].tolist() == pytest.approx(expected.tolist(), abs=1e-10)


def test_sets_that_differ_in_their_pixels_are_refused() -> None:
    alike = torch.rand(2, 60, 1, 8, 8)
    assert abs(pixel_separation(alike[0], alike[1]) - 0.5) < 0.1
    assert refuse_unlike(alike[0], alike[1]) <= 0.6
    with pytest.raises(InputError, match="pixels alone"):
        refuse_unlike(alike[0] * 0.8 + 0.1, alike[1])
    coarse = (alike[0] * 16).round() / 16
    with pytest.raises(InputError, match="kind of file"):
        refuse_unlike(coarse, alike[1])


def test_what_cannot_be_tested_is_refused() -> None:
    suspects, controls = groups(0.0)
    with pytest.raises(InputError, match="at least 5"):
        infer_membership(suspects[:4], controls)
    with pytest.raises(ShapeError, match="features"):
        infer_membership(suspects[:, :3], controls)
    with pytest.raises(NonFiniteError, match="1 features"):
        infer_membership(torch.where(suspects == suspects[0, 0], math.nan, suspects), controls)
    for options in ({"permutations": 0}, {"folds": 1}, {"ridge": 0.0}):
        with pytest.raises(InputError):
            infer_membership(suspects, controls, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sizes"):
        membership_power(suspects, controls, (3,))
    with pytest.raises(ShapeError, match="images"):
        pixel_separation(torch.zeros(6, 8, 8), torch.zeros(6, 8, 8))
