"""Separating features, the gap between modalities and the two shifts that close it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from cmd_plugin.clip import (
    alignment,
    modality_gap,
    separability,
    separating_accuracy,
    shift_along_gap,
    shift_to_origin,
    uniformity,
)
from cmd_plugin.errors import InputError, ShapeError


def two(count: int = 40, dim: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return x[0] + 0.5, x[1] - torch.linspace(0.0, 1.0, dim, dtype=torch.float64)


def test_separability_is_the_distance_of_means_in_spreads() -> None:
    images, texts = two()
    a, b = images.numpy(), texts.numpy()
    expected = abs(a.mean(0) - b.mean(0)) / (a.var(0, ddof=1) + b.var(0, ddof=1)) ** 0.5
    assert torch.allclose(separability(images, texts), torch.from_numpy(expected))
    constant = separability(torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[1.0, 0.0]] * 3))
    assert constant.tolist() == [0.0, math.inf]


def test_the_best_threshold_is_found() -> None:
    images, texts = two(25, 3)
    expected = []
    for left, right in zip(images.T, texts.T, strict=True):
        cuts = torch.cat((left, right))
        rates = [((left <= c).double().mean(), (right <= c).double().mean()) for c in cuts]
        expected.append(max(0.5 + abs(float(a - b)) / 2.0 for a, b in rates))
    assert separating_accuracy(images, texts).tolist() == pytest.approx(expected)
    ties = torch.tensor([[1.0], [1.0], [2.0]])
    assert separating_accuracy(ties, ties).tolist() == [0.5]
    assert separating_accuracy(ties, ties + 2.0).tolist() == [1.0]


def test_two_features_tell_b32_modalities_apart(stored: Callable[[str], Tensor]) -> None:
    images, texts = stored("image_b32_photos130"), stored("text_b32_lvis1203")
    found = separability(images, texts)
    top = [312, 133, 92, 329, 493, 376, 7, 39, 282, 509]
    assert found.topk(10).indices.tolist() == top
    assert found[top[:6]].tolist() == pytest.approx([6.79, 6.79, 5.68, 3.71, 3.03, 2.08], abs=5e-3)
    accuracy = separating_accuracy(images, texts)
    assert accuracy[[92, 133]].tolist() == [1.0, 1.0]
    assert float(accuracy[[93, 134]].max()) < 0.9  # the paper counts from 1


def test_the_gap_against_all_pairs_of_rows() -> None:
    images, texts = two()
    u, w = normalize(images), normalize(texts)
    found = modality_gap(images, texts)
    assert found.l2m == pytest.approx(float((u.mean(0) - w.mean(0)).norm()))
    assert found.paired_cosine == pytest.approx(float(cosine_similarity(u, w).mean()))
    inner = []
    for x in (u, w):
        off = (x @ x.T)[~torch.eye(len(x), dtype=torch.bool)]
        inner.append(float(off.mean()))
    assert (found.image_cosine, found.text_cosine) == pytest.approx(tuple(inner))
    between, within = (1 - found.paired_cosine) / 2, (1 - sum(inner) / 2) / 2
    assert found.rmg == pytest.approx(between / (between + within))


def test_the_gap_of_the_coco_pairs(stored: Callable[[str], Tensor]) -> None:
    images, texts = stored("pairs_b16_coco500_unit")
    found = modality_gap(images, texts)
    assert found.l2m == pytest.approx(0.8513, abs=1e-4)
    assert found.paired_cosine == pytest.approx(0.310, abs=5e-4)
    assert alignment(images, texts) == pytest.approx(1.380, abs=5e-4)


def test_pairs_that_coincide_have_no_gap() -> None:
    images, _ = two()
    found = modality_gap(images, images * 3.0)
    assert (found.l2m, found.rmg) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert alignment(images, images) == pytest.approx(0.0, abs=1e-12)


def test_uniformity_over_all_pairs_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = two()[0]
    squares = torch.pdist(normalize(x)).square()
    expected = float((-3.0 * squares).exp().mean().log())
    assert uniformity(x, 3.0) == pytest.approx(expected)
    monkeypatch.setattr("cmd_plugin.clip.gap._BLOCK", 7)
    assert uniformity(x, 3.0) == pytest.approx(expected)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0.0)
    with pytest.raises(InputError, match="sharpness"):
        uniformity(x, 0.0)


def test_the_shift_along_the_gap_closes_it_and_stays_on_the_sphere() -> None:
    images, texts = two()
    moved = shift_along_gap(images, texts, 0.0)
    assert torch.allclose(moved[0], normalize(images))
    wide = modality_gap(*shift_along_gap(images, texts, -0.5)).l2m
    narrow = modality_gap(*shift_along_gap(images, texts, 0.5)).l2m
    assert wide > modality_gap(images, texts).l2m > narrow
    for x in shift_along_gap(images, texts[:9], 0.7):
        assert torch.allclose(x.norm(dim=1), torch.ones(len(x), dtype=torch.float64))


def test_the_shift_to_the_origin_moves_what_is_asked() -> None:
    images, texts = two()
    left, right = shift_to_origin(images, texts, 1.0)
    assert float(left.mean(0).norm() + right.mean(0).norm()) == pytest.approx(0.0, abs=1e-12)
    left, right = shift_to_origin(images, texts, -1.0, "text")
    assert torch.equal(left, images)
    assert torch.allclose(right, texts + texts.mean(0))
    with pytest.raises(InputError, match="both, image or text"):
        shift_to_origin(images, texts, 1.0, "images")  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    images, texts = two()
    with pytest.raises(ShapeError, match="pairs, row by row"):
        modality_gap(images, texts[:9])
    with pytest.raises(ShapeError, match="of one model"):
        separability(images, texts[:, :3])
