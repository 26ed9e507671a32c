"""Groups of images of one histogram: order kept, ties kept, the other's levels."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.diffusion import match_histogram
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
