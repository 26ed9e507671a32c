"""A good split, a collapsed one and a trick are told apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.distinction import SplitQuality, decompose, measure_split, specialization
from cmd_plugin.distinction.covariance import branch_covariance
from cmd_plugin.errors import InputError
from tests.helpers.distinction import decomposer, images

LABELS = torch.tensor([0, 0, 1, 1, 1, 1])


def report(distinct: Tensor, after: list[int], judged: list[int], before: Tensor = LABELS):  # noqa: ANN201
    quality = SplitQuality(2, 3)
    x = images(6)
    rest = 0.5 * (x - distinct)
    branches = torch.stack([distinct, rest, rest], dim=1)
    quality.update(
        x, branches, LABELS, (before, torch.tensor(after)), (LABELS, torch.tensor(judged))
    )
    return quality.compute()


def test_a_good_split_is_not_warned_of() -> None:
    found = report(0.5 * images(6, seed=1), [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0])
    assert found.warnings() == []
    assert not found.collapsed
    assert found.accuracy == (1.0, 1.0)
    assert found.removed == (0.0, 0.0)
    assert found.shortcut == 0.0


def test_an_empty_branch_is_a_collapse() -> None:
    found = report(torch.zeros(6, 1, 8, 8), LABELS.tolist(), LABELS.tolist())
    assert found.collapsed
    assert "collapsed" in found.warnings()[0]
    assert found.psnr > 100  # the others add up to the image


def test_a_branch_that_takes_nothing_away_is_a_collapse() -> None:
    assert report(0.5 * images(6, seed=1), LABELS.tolist(), LABELS.tolist()).collapsed


def test_a_pattern_that_fools_the_classifier_alone_is_a_shortcut() -> None:
    found = report(0.5 * images(6, seed=1), [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1])
    assert found.shortcut == pytest.approx(1.0)  # class 0: fooled entirely, the judge not at all
    assert "fools the classifier" in found.warnings()[0]


def test_a_classifier_that_knows_little_is_warned_of() -> None:
    wrong = torch.tensor([0, 0, 1, 0, 0, 0])
    found = report(0.5 * images(6, seed=1), [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], wrong)
    assert "little to explain" in found.warnings()[0]


def test_numbers_are_their_definitions() -> None:
    x, branches = images(6), torch.randn(6, 3, 1, 8, 8)
    quality = SplitQuality(2, 3, width=5.0)
    for part in range(0, 6, 2):
        quality.update(x[part : part + 2], branches[part : part + 2], LABELS[part : part + 2])
    found = quality.compute()
    error = (branches.sum(dim=1) - x).square().mean().item()
    assert found.psnr == pytest.approx(10 * math.log10(25 / error), rel=1e-6)
    assert found.specialization == pytest.approx(specialization(branch_covariance(branches)))
    power = branches[:, 0].var(correction=0) / x.var(correction=0)
    assert found.distinct_power == pytest.approx(power.item(), rel=1e-5)
    assert found.judge_accuracy == found.accuracy == ()
    assert not found.collapsed


def test_a_whole_set_is_measured_with_a_judge() -> None:
    net, judge = decomposer(), nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x, labels = images(12), torch.arange(12) % 2
    batches = [(x[:7], labels[:7]), (x[7:], labels[7:])]
    found = measure_split(net, batches, judge)
    split = decompose(net, x, labels)
    for shown, known, seen in (
        (x, found.accuracy, net.classifier),
        (split.agnostic, found.removed, net.classifier),
        (x, found.judge_accuracy, judge),
        (split.agnostic, found.judge_removed, judge),
    ):
        right = (seen(shown).argmax(dim=1) == labels).float()  # type: ignore[misc]
        assert known == pytest.approx([right[labels == k].mean().item() for k in (0, 1)])
    assert found.as_dict()["removed"] == list(found.removed)
    with pytest.raises(InputError, match="nothing to measure"):
        measure_split(net, [])


def test_a_class_without_images_is_not_a_number() -> None:
    quality = SplitQuality(3, 2)
    quality.update(images(2), torch.randn(2, 2, 1, 8, 8), torch.tensor([0, 0]), (LABELS[:2],) * 2)
    found = quality.compute()
    assert math.isnan(found.accuracy[2])
    assert found.as_dict()["accuracy"] == [1.0, None, None]
    assert found.shortcut == 0.0
