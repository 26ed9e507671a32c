"""Drop curves against a network whose answer depends on known points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.pointcloud import DropCurve, perturbed_logits, random_scores, roughness

FRACTIONS = (0.0, 0.25, 0.5, 0.75)


def clouds(batch: int = 5, points: int = 20) -> Tensor:
    """Every point's x is its own number, in a random order of points."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(points, generator=generator) for _ in range(batch)])
    return torch.stack([order.float(), torch.zeros(batch, points), torch.zeros(batch, points)], 2)


def kept(seen: list[Tensor]) -> list[list[list[int]]]:
    return [[sorted(cloud[:, 0].int().tolist()) for cloud in batch] for batch in seen]


class Recorder:
    """Remembers what it was asked; its logit of class 0 is the largest x left."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, points: Tensor) -> Tensor:
        self.seen.append(points)
        return torch.stack([points[:, :, 0].amax(dim=1), torch.full((len(points),), 9.5)], dim=1)


@pytest.mark.parametrize(("order", "left"), [("high", range), ("low", None)])
def test_the_right_points_go(order: str, left: object) -> None:
    given, model = clouds(), Recorder()
    result = perturbed_logits(model, given, given[:, :, 0], order, fractions=FRACTIONS)
    assert result.shape == (4, 5, 2)
    for fraction, batch in zip(FRACTIONS, kept(model.seen), strict=True):
        gone = int(20 * fraction)
        expected = list(range(20 - gone)) if left is not None else list(range(gone, 20))
        assert batch == [expected] * 5


def test_insertion_moves_points_out_of_the_centroid() -> None:
    given, model = clouds(), Recorder()
    perturbed_logits(model, given, given[:, :, 0], "insertion", fractions=(0.0, 0.5, 1.0))
    nothing, half, all_in = model.seen
    assert (nothing[:, :, 0] == 9.5).all()  # mean of 0..19
    assert (half[:, 10:, 0] == 9.5).all()
    assert kept([half[:, :10]]) == [[list(range(10, 20))] * 5]
    assert kept([all_in]) == [[list(range(20))] * 5]


def test_scoring_again_sees_what_is_left() -> None:
    given, model = clouds(), Recorder()
    asked: list[int] = []

    def score(points: Tensor) -> Tensor:
        asked.append(points.shape[1])
        # First the highest go, then the lowest: an order that no single scoring gives.
        return points[:, :, 0] if points.shape[1] == 20 else -points[:, :, 0]

    perturbed_logits(model, given, score, "high", fractions=FRACTIONS)
    assert asked == [20, 15, 10]
    assert kept(model.seen)[1:] == [[list(range(*ends))] * 5 for ends in ((15,), (5, 15), (10, 15))]


def test_ties_go_in_a_random_order_of_the_seed_and_the_sample() -> None:
    given = clouds(6)[:1].expand(6, -1, -1)
    seen = []
    for seed in (0, 1, 0):
        model = Recorder()
        perturbed_logits(model, given, torch.zeros(6, 20), "high", fractions=(0, 0.5), seed=seed)
        seen.append(kept(model.seen)[1])
    assert seen[0] == seen[2] != seen[1]
    assert len({tuple(cloud) for cloud in seen[0]}) == 6
    model = Recorder()
    perturbed_logits(
        model,
        given[:2],
        torch.zeros(2, 20),
        "high",
        fractions=(0, 0.5),
        index=torch.tensor([4, 2]),
    )
    assert kept(model.seen)[1] == [seen[0][4], seen[0][2]]


def test_random_scores_belong_to_the_sample() -> None:
    given = clouds()
    whole = random_scores(given, seed=1)
    assert torch.equal(random_scores(given[3:4], seed=1, index=torch.tensor([3])), whole[3:4])
    assert whole.flatten().unique().numel() == 100


def test_curve_and_area_by_hand() -> None:
    curve = DropCurve(FRACTIONS)
    target = torch.tensor([0, 0, 1])
    logits = torch.zeros(4, 3, 2)
    logits[0, :, 0], logits[1, :, 0], logits[2, :, 0], logits[3, :, 1] = 2.0, 1.0, 1.0, 3.0
    curve.update(logits, target)
    result = curve.compute()
    expected = torch.tensor([2 / 3, 2 / 3, 2 / 3, 1 / 3], dtype=torch.float64)
    assert torch.allclose(result["accuracy"], expected, rtol=1e-15)
    assert float(result["accuracy_auc"]) == pytest.approx(0.25 * (2 / 3 + 2 / 3 + 1 / 2))
    p = torch.tensor([2.0, 1.0, 1.0, -3.0], dtype=torch.float64).sigmoid()
    assert torch.allclose(result["probability"], (2 * p + (1 - p)) / 3, rtol=1e-12)
    curve.update(logits, 1 - target)
    assert torch.allclose(curve.compute()["accuracy"], torch.full((4,), 0.5).double())


def test_a_good_score_has_a_low_high_drop_and_a_high_low_drop() -> None:
    given, target = clouds(), torch.zeros(5, dtype=torch.int64)
    areas = {}
    for order in ("high", "low"):
        curve = DropCurve(FRACTIONS)
        curve.update(
            perturbed_logits(Recorder(), given, given[:, :, 0], order, fractions=FRACTIONS), target
        )
        areas[order] = float(curve.compute()["accuracy_auc"])
    assert areas == {"high": pytest.approx(0.25 + 0.125), "low": pytest.approx(0.75)}


def test_bad_input() -> None:
    given, score = clouds(), torch.zeros(5, 20)
    model = Recorder()
    for bad in ((0.5,), (0.2, 0.1), (-0.1, 0.5), (0.0, 1.5)):
        with pytest.raises(InputError, match="fractions must rise"):
            perturbed_logits(model, given, score, fractions=bad)
        with pytest.raises(InputError, match="fractions must rise"):
            DropCurve(bad)
    with pytest.raises(InputError, match="leaves no point"):
        perturbed_logits(model, given, score, fractions=(0.0, 1.0))
    with pytest.raises(InputError, match="order must be"):
        perturbed_logits(model, given, score, "up")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="insertion needs"):
        perturbed_logits(model, given, lambda p: p[:, :, 0], "insertion")
    with pytest.raises(ShapeError, match="points must be"):
        perturbed_logits(model, given.mT, score)
    with pytest.raises(ShapeError, match="score must be"):
        perturbed_logits(model, given, score[:, 1:])
    score[0, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN"):
        perturbed_logits(model, given, score)
    curve = DropCurve()
    with pytest.raises(ShapeError, match="logits must be"):
        curve.update(torch.zeros(3, 2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="no clouds were seen"):
        curve.compute()


def test_roughness_is_the_mean_jump_to_the_neighbours() -> None:
    line = torch.stack([torch.arange(4.0), torch.zeros(4), torch.zeros(4)], dim=1)[None]
    scores = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    # One neighbour each, the lower of two equally near: 1, 0, 1, 2.
    expected = (1 + 1 + 1 + 7) / 4 / float(scores.std(correction=0))
    assert float(roughness(line, scores, 1)) == pytest.approx(expected)
    assert float(roughness(line, 5 * scores - 3, 1)) == pytest.approx(expected)  # no unit
    assert float(roughness(line, scores * 0 + 2, 1)) == 0.0
    assert float(roughness(line, scores, 100)) == pytest.approx(float(roughness(line, scores, 3)))


def test_smooth_scores_are_smoother_than_random_ones() -> None:
    points = torch.rand(3, 600, 3, generator=torch.Generator().manual_seed(0))
    smooth, random = roughness(points, points[..., 2]), roughness(points, random_scores(points))
    assert (smooth < 0.5 * random).all()
    assert random.tolist() == pytest.approx([0.86, 0.86, 0.86], abs=0.05)


def test_roughness_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="scores \\[B, N\\]"):
        roughness(clouds(), torch.zeros(5, 19))
    with pytest.raises(ShapeError, match="needs a neighbour, got 1 points"):
        roughness(clouds()[:, :1], torch.zeros(5, 1))
    with pytest.raises(NonFiniteError, match="scores hold NaN"):
        roughness(clouds(), torch.full((5, 20), torch.nan))
