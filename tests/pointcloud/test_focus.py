"""Focus references: robust statistics in constant memory; rotation consistency; alarms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import spearmanr

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError, StateMismatch
from cmd_plugin.pointcloud import (
    FocusReference,
    build_network,
    gini,
    point_importance,
    separation,
    unusual_scores,
)
from cmd_plugin.pointcloud.focus import focus_alarms
from cmd_plugin.pointcloud.rotation import rank_correlation, rotation_consistency, turned
from cmd_plugin.runs.tensors import Schema

BIN = 1 / 65536


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_median_and_spread_are_those_of_the_values(values: list[float]) -> None:
    reference = FocusReference(1024)
    entropy = torch.tensor(values, dtype=torch.float64)
    reference.update(entropy)
    median = float(entropy.median())
    spread = float((entropy - entropy.median()).abs().median())
    assert reference.clouds == len(values)
    assert abs(reference.median - median) <= BIN
    assert abs(reference.spread - max(spread, BIN / 2)) <= 3 * BIN  # of value, centre and median


def test_two_halves_merge_to_the_whole_and_a_file_keeps_it(tmp_path: Path) -> None:
    values = torch.rand(101, dtype=torch.float64) * 0.1 + 0.75
    whole, first, second = FocusReference(512), FocusReference(512), FocusReference(512)
    whole.update(values)
    first.update(values[:40])
    second.update(values[40:])
    first.merge(second)
    assert torch.equal(first.histogram, whole.histogram)
    whole.save(tmp_path / "focus.safetensors")
    loaded = FocusReference.load(tmp_path / "focus.safetensors")
    other = FocusReference(1)
    other.load_state_dict(whole.state_dict())
    for copy in (loaded, other):
        assert (copy.points, copy.median, copy.spread) == (512, whole.median, whole.spread)
    odd = torch.tensor([0.3, 0.8])
    scores = whole.uncertainty(odd, 512)
    assert scores[0] > 10 * scores[1]
    expected = abs(float(odd[1]) - whole.median) / whole.spread  # 0.8 in float32
    assert float(scores[1]) == pytest.approx(expected, rel=1e-9)


def test_references_refuse_what_does_not_compare(tmp_path: Path) -> None:
    reference = FocusReference(512)
    with pytest.raises(InputError, match="empty"):
        reference.uncertainty(torch.tensor([0.5]), 512)
    with pytest.raises(InputError, match="512 points, not 1024"):
        reference.uncertainty(torch.tensor([0.5]), 1024)
    with pytest.raises(StateMismatch, match="512 and 64"):
        reference.merge(FocusReference(64))
    with pytest.raises(NonFiniteError):
        reference.update(torch.tensor([math.nan]))
    with pytest.raises(StateMismatch):
        reference.load_state_dict({"points": 3})
    with pytest.raises(InputError, match="at least 1"):
        FocusReference(0)
    with pytest.raises(InputError, match="there is no file"):
        FocusReference.load(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputError, match="not a FocusReference"):
        FocusReference.load(tmp_path / "other")


@pytest.mark.parametrize("points", [None, "many", "0"])
def test_a_file_that_does_not_fit_is_refused(points: str | None, tmp_path: Path) -> None:
    about = {} if points is None else {"points": points}
    Schema("focus-reference", 1, "a FocusReference").save(
        tmp_path / "f.safetensors", {"histogram": FocusReference(3).histogram}, about
    )
    with pytest.raises(InputError, match="is damaged"):
        FocusReference.load(tmp_path / "f.safetensors")


def test_a_refused_state_changes_nothing() -> None:
    reference = FocusReference(512)
    reference.update(torch.tensor([0.5]))
    fitting = reference.state_dict()
    for wrong in (
        {**fitting, "points": "512"},
        {**fitting, "histogram": fitting["histogram"][1:]},
        {**fitting, "histogram": fitting["histogram"].float()},
        {**fitting, "histogram": fitting["histogram"] - 1},
    ):
        with pytest.raises(StateMismatch):
            reference.load_state_dict(wrong)
        assert (reference.points, reference.clouds) == (512, 1)


def test_alarms_are_the_odd_ones() -> None:
    entropy = torch.tensor([0.80, 0.81, 0.79, 0.80, 0.82, 0.30])
    assert focus_alarms(entropy).tolist() == [False] * 5 + [True]
    assert not focus_alarms(torch.full((4,), 0.5)).any()


def test_rank_correlation_is_scipys() -> None:
    a = torch.randint(0, 6, (5, 40)).float()
    b = torch.randint(0, 6, (5, 40)).float() + a
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(expected)
    assert rank_correlation(a[:, :1].expand(-1, 9), b[:, :9]).tolist() == [0.0] * 5
    with pytest.raises(ShapeError):
        rank_correlation(a, b[:, :3])


def test_turning_keeps_distances_and_the_axis() -> None:
    points = torch.randn(3, 30, 4, dtype=torch.float64)
    moved = turned(points, torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64), axis=1)
    torch.testing.assert_close(moved[..., 1], points[..., 1])
    torch.testing.assert_close(moved[..., 3], points[..., 3])
    distances = torch.cdist(points[..., :3], points[..., :3])
    torch.testing.assert_close(torch.cdist(moved[..., :3], moved[..., :3]), distances)
    quarter = turned(torch.tensor([[[1.0, 0, 0]]]), torch.tensor([math.pi / 2]))
    torch.testing.assert_close(quarter, torch.tensor([[[0.0, 1, 0]]]), atol=1e-6, rtol=0)
    with pytest.raises(InputError):
        turned(points, torch.zeros(3), axis=3)


def test_a_network_that_sees_only_height_is_consistent_under_turns_about_it() -> None:
    network, points = build_network("pointnet", 3, width=0.25).eval(), torch.randn(3, 50, 3)
    generator = torch.Generator().manual_seed(0)
    ordinary = rotation_consistency(network, points, generator)
    with torch.no_grad():
        network.feature_model.conv1.weight[:, :2] = 0.0  # type: ignore[union-attr, index]
    blind = rotation_consistency(network, points, generator)
    torch.testing.assert_close(blind, torch.ones(3, dtype=torch.float64))
    assert (ordinary < 0.999).all()


def test_gini_of_known_distributions() -> None:
    scores = torch.tensor([[2.0, 2, 2, 2], [0, 0, 7, 0], [1, 3, 0, 0], [0, 0, 0, 0]])
    # By the mean absolute difference of all pairs over twice the mean.
    pairs = (scores[:, :, None] - scores[:, None, :]).abs().mean(dim=(1, 2))
    expected = (pairs / (2 * scores.mean(dim=1)).clamp_min(1e-9)).tolist()
    assert gini(scores).tolist() == pytest.approx(expected, abs=1e-7)
    assert gini(scores).tolist()[:2] == [0.0, 0.75]
    with pytest.raises(InputError, match="negative"):
        gini(-scores)
    with pytest.raises(InputError, match="NaN"):
        gini(scores * torch.nan)
    with pytest.raises(ShapeError, match="B, N"):
        gini(scores[0])


def test_unusual_scores_are_those_of_their_definitions_at_equal_size_only() -> None:
    network = build_network("pointnet", 4, width=0.25).eval()
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(12, 80, 3, generator=generator) / 2
    seen = point_importance(network, clean, "critical++")
    reference = FocusReference(80)
    assert seen.entropy is not None
    reference.update(seen.entropy)
    scores = unusual_scores(seen, reference)
    assert {*scores} == {"mean", "max", "Gini", "uncertainty", "1 - max softmax", "energy"}
    assert all(score.shape == (12,) and score.dtype == torch.float64 for score in scores.values())
    logits = seen.output.double()
    assert torch.allclose(scores["energy"], -logits.exp().sum(dim=1).log())
    assert torch.allclose(scores["1 - max softmax"], 1 - logits.softmax(1).max(1).values)
    assert torch.equal(scores["uncertainty"], reference.uncertainty(seen.entropy, 80))
    assert torch.equal(scores["max"], seen.norm.double().amax(dim=1))
    assert torch.equal(scores["Gini"], gini(seen.norm))
    far = point_importance(network, 30 * clean, "critical++")  # far outside: larger features
    found = separation(scores, unusual_scores(far, reference))
    assert found["max"] == found["mean"] == 1.0
    same = separation(scores, scores)
    assert list(same.values()) == [pytest.approx(0.5)] * 6
    fewer = point_importance(network, clean[:, :79], "critical++")
    with pytest.raises(InputError, match="80 points, not 79"):
        unusual_scores(fewer, reference)
    with pytest.raises(InputError, match="counts"):
        unusual_scores(point_importance(network, clean), reference)
    ragged = point_importance(
        network, clean, "critical++", mask=torch.ones(12, 80, dtype=torch.bool)
    )
    with pytest.raises(InputError, match="equal size"):
        unusual_scores(ragged, reference)


def test_separation_is_the_share_of_pairs_in_order() -> None:
    clean, other = torch.tensor([0.0, 1.0, 40.0]), torch.tensor([30.0, 50.0])
    assert separation({"a": clean}, {"a": other}) == {"a": pytest.approx(5 / 6)}
    assert separation({"a": other}, {"a": clean}) == {"a": pytest.approx(1 / 6)}
    with pytest.raises(InputError, match="give the same"):
        separation({"a": clean}, {"b": other})
    with pytest.raises(InputError, match="both groups need a score"):
        separation({"a": clean}, {"a": other[:0]})
    with pytest.raises(ShapeError, match="one number each"):
        separation({"a": clean[None]}, {"a": other})
