"""AUROC, AUPR and FPR95 of scores of any range, against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from cmd_plugin.errors import NonFiniteError
from cmd_plugin.pointcloud import outlier_metrics


def planted(batch: int = 12, points: int = 60, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(batch, points, generator=generator) < 0.2).long()
    scores = torch.randn(batch, points, generator=generator) + 1.5 * labels
    return scores * scale, labels


def false_positive_rate_95(labels: Tensor, scores: Tensor) -> float:
    rates, found, _ = roc_curve(labels.numpy(), scores.numpy(), drop_intermediate=False)
    return float(rates[found >= 0.95].min())


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_values_do_not_depend_on_the_range_of_the_score(scale: float) -> None:
    scores, labels = planted(scale=scale)
    metrics = outlier_metrics()
    for part in range(0, 12, 4):
        metrics.update(scores[part : part + 4], labels[part : part + 4])
    result = metrics.compute()
    flat, truth = scores.flatten(), labels.flatten()
    assert float(result["AUROC"]) == pytest.approx(roc_auc_score(truth, flat), abs=1e-6)
    assert float(result["AUPR"]) == pytest.approx(average_precision_score(truth, flat), abs=1e-6)
    assert float(result["FPR95"]) == pytest.approx(false_positive_rate_95(truth, flat), abs=1e-6)


def test_counts_above_17_stay_different() -> None:
    """A sigmoid in float32 would call all of these 1."""
    labels = torch.tensor([0, 0, 1, 1])
    metrics = outlier_metrics()
    metrics.update(torch.tensor([20, 30, 40, 500]), labels)
    assert float(metrics.compute()["AUROC"]) == 1.0
    assert float(metrics.compute()["FPR95"]) == 0.0


def test_binned_metrics_keep_constant_memory() -> None:
    scores, labels = planted()
    metrics = outlier_metrics(thresholds=200)
    for _ in range(3):
        metrics.update(scores, labels)
    exact = roc_auc_score(labels.flatten(), scores.flatten())
    assert float(metrics.compute()["AUROC"]) == pytest.approx(exact, abs=0.01)
    assert metrics["AUROC"].confmat.shape == (200, 2, 2)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores, labels = planted()
    scores[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
        outlier_metrics().update(scores, labels)
