"""Groups made alike, and what pixels alone say of an image, against loops over pixels."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.diffusion import (
    content_statistics,
    match_histogram,
    match_levels,
    nearest_distance,
)
from cmd_plugin.errors import ShapeError


def test_a_group_gets_the_levels_of_the_other_in_its_own_order() -> None:
    images, like = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    found = match_histogram(images, like)
    for channel in range(2):
        one, other = images[:, channel].flatten(), found[:, channel].flatten()
        assert torch.equal(other.sort().values, like[:, channel].flatten().sort().values)
        assert torch.equal(one.argsort(), other.argsort())


def test_a_group_matched_with_itself_or_with_few_levels_stays_sensible() -> None:
    levels = torch.randint(5, (4, 1, 6, 6)).float()
    assert torch.equal(match_histogram(levels, levels), levels)
    two = match_histogram(torch.randn(2, 1, 8, 8), torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
    assert sorted(two.unique().tolist()) == [0.0, 1.0]
    assert float(two.mean()) == 0.5
    with pytest.raises(ShapeError, match="equal C"):
        match_histogram(levels, torch.zeros(1, 3, 6, 6))


def test_each_value_goes_to_the_nearest_level_there_is() -> None:
    images, like = torch.randn(3, 2, 4, 4), torch.randint(-2, 3, (2, 2, 5, 5)).float() / 2
    found = match_levels(images, like)
    for channel in range(2):
        levels = like[:, channel].unique()
        one, other = images[:, channel].flatten(), found[:, channel].flatten()
        nearest = levels[(one[:, None] - levels).abs().argmin(1)]
        assert torch.equal(other, nearest)
    assert torch.equal(match_levels(like, like), like)
    with pytest.raises(ShapeError, match="equal C"):
        match_levels(images, torch.zeros(1, 3, 4, 4))


def test_pixels_alone_give_a_norm_a_variation_and_a_distance() -> None:
    images, known = torch.rand(3, 2, 3, 4), torch.rand(5, 2, 3, 4)
    found = content_statistics(images)
    for number, image in enumerate(images.double()):
        steps = [
            abs(float(image[c, y, x] - image[c, y + dy, x + dx]))
            for c in range(2)
            for y in range(3)
            for x in range(4)
            for dy, dx in ((1, 0), (0, 1))
            if y + dy < 3 and x + dx < 4
        ]
        assert float(found["total_variation"][number]) == pytest.approx(sum(steps) / len(steps))
        assert float(found["norm"][number]) == pytest.approx(float(image.square().mean().sqrt()))
        away = [float((image - other).square().mean().sqrt()) for other in known.double()]
        assert float(nearest_distance(images, known)[number]) == pytest.approx(min(away))
