"""Curves of a classifier that loses its evidence, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.distinction import curves
from cmd_plugin.distinction.curves import Curve
from cmd_plugin.errors import ShapeError
from tests.helpers.distinction import Linear, images

MASK = torch.zeros(1, 8, 8)
MASK[:, 2:4, 2:4] = 1.0
LABELS = torch.tensor([1, 1, 1, 1])


def classify(x: Tensor) -> Tensor:
    """Class 1 if the four marked pixels add up to more than 2."""
    with torch.no_grad():
        answer: Tensor = Linear(MASK, bias=-2.0)(x)
    return answer


def evident() -> Tensor:
    """Images of class 1: the marked pixels are 1."""
    return 0.1 * images() * (1 - MASK) + MASK


def test_the_removal_curve_of_a_linear_classifier_has_a_closed_form() -> None:
    """4 (1 - share) - 2 > 0 holds below one half: right at 0 .. 0.4, wrong from 0.5 on."""
    found = curves.removal_curve(classify, evident(), MASK.expand(4, 1, 8, 8), LABELS)
    assert found.shares == curves.REMOVED_SHARES
    assert found.accuracy == (1.0,) * 5 + (0.0,) * 6
    assert found.area == pytest.approx(0.45)


def test_nothing_taken_away_is_a_flat_curve() -> None:
    found = curves.removal_curve(classify, evident(), torch.zeros(4, 1, 8, 8), LABELS)
    assert set(found.accuracy) == {1.0}
    assert found.area == pytest.approx(1.0)


def test_areas_do_not_depend_on_where_a_curve_starts_and_ends() -> None:
    assert Curve((0.0, 0.1, 0.2), (0.8, 0.4, 0.0)).area == pytest.approx(0.5)
    assert math.isnan(Curve((0.0, 1.0), (0.0, 0.0)).area)


def test_a_heatmap_takes_away_the_image_by_its_size() -> None:
    x, maps = images(), torch.zeros(4, 1, 8, 8)
    maps[:, 0, 0, 0], maps[:, 0, 0, 1] = -4.0, 2.0
    part = curves.heatmap_part(x, maps)
    torch.testing.assert_close(part[:, 0, 0, 0], x[:, 0, 0, 0])
    torch.testing.assert_close(part[:, 0, 0, 1], 0.5 * x[:, 0, 0, 1])
    assert not part[:, 0, 1:].any()
    assert not curves.heatmap_part(x, torch.zeros_like(x)).any()


def test_deletion_goes_by_the_ranking() -> None:
    """The evidence is 4 of 64 pixels, of which 2 have to go: a share of 1/16 deletes all four."""
    shares = (0.0, 1 / 64, 2 / 64, 4 / 64)
    best = MASK.expand(4, 1, 8, 8)
    found = curves.deletion_curve(classify, evident(), best, LABELS, shares)
    assert found.accuracy == (1.0, 1.0, 0.0, 0.0)
    worst = curves.deletion_curve(classify, evident(), 1 - best, LABELS, shares)
    assert set(worst.accuracy) == {1.0}
    signed = torch.cat([best, -best, torch.zeros_like(best)], dim=1)  # channels by their size
    rgb = evident().expand(4, 3, 8, 8)
    again = curves.deletion_curve(lambda x: classify(x[:, :1]), rgb, signed, LABELS, shares)
    assert again.accuracy == found.accuracy


def test_the_greedy_ranking_finds_the_evidence() -> None:
    shares = (0.0, 2 / 64, 4 / 64)
    ranking = curves.greedy_ranking(classify, evident(), LABELS, shares)
    assert torch.equal(ranking > 0, (MASK > 0).expand(4, 1, 8, 8))
    assert sorted(ranking[0].unique().tolist()) == [0.0, 1.0, 2.0]
    patches = curves.greedy_ranking(classify, evident(), LABELS, (0.0, 1 / 16), patch=2)
    assert torch.equal(patches > 0, (MASK > 0).expand(4, 1, 8, 8))
    with pytest.raises(ShapeError, match="do not fit"):
        curves.greedy_ranking(classify, evident(), LABELS, patch=3)


def test_areas_are_put_between_the_limits() -> None:
    assert curves.normalised_area(0.9, 0.9, 0.5) == 0.0
    assert curves.normalised_area(0.5, 0.9, 0.5) == 1.0
    assert curves.normalised_area(0.7, 0.9, 0.5) == pytest.approx(0.5)
    assert curves.normalised_area(0.7, 0.5, 0.5) is None
    assert curves.normalised_area(math.nan, 0.9, 0.5) is None


def test_deleted_pixels_are_grey_or_what_their_neighbours_say() -> None:
    ramp = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8).clone()
    deleted = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    deleted[..., 3:5, 3:5] = True
    grey = curves.fill_grey(ramp, deleted)
    assert not grey[deleted].any()
    assert torch.equal(grey[~deleted], ramp[~deleted])
    filled = curves.fill_in(ramp, deleted)
    assert torch.equal(filled[~deleted], ramp[~deleted])
    torch.testing.assert_close(filled, ramp, atol=0.02, rtol=0.0)  # a ramp is its own membrane
    everything = torch.ones_like(deleted)
    assert bool(curves.fill_in(ramp, everything).isfinite().all())


def test_a_change_that_works_at_once_has_a_high_cout() -> None:
    changed = evident() * (1 - MASK)
    zeros = torch.zeros(4, dtype=torch.int64)

    def sure(x: Tensor) -> Tensor:
        return 1000.0 * classify(x)

    good = curves.counterfactual_transition(sure, evident(), changed, LABELS, zeros)
    # a tenth of 64 pixels are 6: all four are gone after one step; 1 - 2 * (1 / 2) / 10
    torch.testing.assert_close(good, torch.full((4,), 0.9))
    idle = curves.counterfactual_transition(sure, evident(), evident(), LABELS, zeros)
    torch.testing.assert_close(idle, torch.full((4,), -1.0))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError):
        curves.removal_curve(classify, images(), images(3), LABELS)
    with pytest.raises(ShapeError):
        curves.deletion_curve(classify, images(), images(), LABELS[:2])
