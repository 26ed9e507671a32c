"""Diversity measures against counts made by hand and by NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud import EnsembleDiversity

VIEWS = ("patch", "patch", "curve", "random")


def votes(clouds: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (clouds,), generator=generator)
    logits = torch.randn(clouds, 4, 5, generator=generator)
    logits[torch.arange(clouds), :, target] += torch.tensor([0.5, 1.0, 1.5, 2.0])
    logits[:, 1] += logits[:, 0]  # these two err together
    return logits, target


def test_measures_equal_an_independent_calculation() -> None:
    logits, target = votes()
    metric = EnsembleDiversity(VIEWS)
    for part in range(0, 300, 70):
        metric.update(logits[part : part + 70], target[part : part + 70])
    result = metric.summary()
    wrong = (logits.argmax(2) != target[:, None]).numpy()
    assert result.accuracy.tolist() == pytest.approx((~wrong).mean(0).tolist())
    vote = logits.mean(dim=1).argmax(dim=1)
    assert result.ensemble_accuracy == pytest.approx(float((vote == target).float().mean()))
    assert result.gap == pytest.approx(result.ensemble_accuracy - (~wrong).mean())
    correlation = np.corrcoef(wrong.T)
    assert np.allclose(result.error_correlation.numpy(), correlation, atol=1e-12)
    for i in range(4):
        for j in range(4):
            a, b = wrong[:, i], wrong[:, j]
            both, neither = (a & b).sum(), (~a & ~b).sum()
            first, second = (a & ~b).sum(), (~a & b).sum()
            assert float(result.disagreement[i, j]) == pytest.approx((a ^ b).mean())
            assert float(result.double_fault[i, j]) == pytest.approx((a & b).mean())
            q = (both * neither - first * second) / (both * neither + first * second)
            assert float(result.yule_q[i, j]) == pytest.approx(q)


def test_ambiguity_decomposition_is_an_identity() -> None:
    logits, target = votes()
    metric = EnsembleDiversity(VIEWS)
    metric.update(logits, target)
    result = metric.summary()
    mean = logits.double().softmax(dim=2).mean(dim=1)
    truth = torch.nn.functional.one_hot(target, 5)
    brier = float((mean - truth).square().sum(dim=1).mean())
    assert result.member_brier - result.ambiguity == pytest.approx(brier, rel=1e-12)
    assert result.ambiguity > 0


def test_pairs_of_views() -> None:
    logits, target = votes()
    metric = EnsembleDiversity(VIEWS)
    metric.update(logits, target)
    result = metric.summary()
    within = result.between("patch", "patch")
    assert within["error_correlation"] == pytest.approx(float(result.error_correlation[0, 1]))
    across = result.between("patch", "random")
    assert across["disagreement"] == pytest.approx(float(result.disagreement[:2, 3].mean()))
    assert within["error_correlation"] > across["error_correlation"] + 0.2
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = sum(float(result.yule_q[i, j]) for i, j in pairs) / 12
    assert result.overall()["yule_q"] == pytest.approx(expected)
    with pytest.raises(InputError, match="no pair of members 'curve' and 'curve'"):
        result.between("curve", "curve")
    scalars = metric.compute()
    assert float(scalars["gap"]) == pytest.approx(result.gap)
    assert float(scalars["yule_q"]) == pytest.approx(expected)


def test_members_that_never_err_or_are_the_same() -> None:
    target = torch.tensor([0, 1, 0, 1])
    logits = torch.zeros(4, 3, 2)
    logits[torch.arange(4), :, target] = 1.0
    logits[0, 1:] = torch.tensor([0.0, 1.0])  # the last two err on the first cloud, together
    metric = EnsembleDiversity(("patch", "curve", "random"))
    metric.update(logits, target)
    result = metric.summary()
    assert result.accuracy.tolist() == [1.0, 0.75, 0.75]
    assert float(result.error_correlation[1, 2]) == pytest.approx(1.0)
    assert float(result.yule_q[1, 2]) == 1.0
    assert float(result.disagreement[1, 2]) == 0.0
    assert math.isnan(float(result.error_correlation[0, 1]))
    assert math.isnan(float(result.yule_q[0, 1]))
    assert result.overall()["error_correlation"] == pytest.approx(1.0)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least two"):
        EnsembleDiversity(("patch",))
    metric = EnsembleDiversity(VIEWS)
    with pytest.raises(InputError, match="no clouds were seen"):
        metric.summary()
    with pytest.raises(ShapeError, match=r"logits must be \[B, 4, C\]"):
        metric.update(torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.int64))
