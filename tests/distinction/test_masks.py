"""Maps against masks."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.distinction.masks import mask_iou, mass_inside, pointing_game
from cmd_plugin.errors import ShapeError


def test_scores_of_a_known_map() -> None:
    maps = torch.zeros(3, 1, 4, 4)
    maps[:, 0, 0, :2] = torch.tensor([-3.0, 2.0])
    maps[:, 0, 1, 0] = 1.0
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True  # the two largest
    masks[1, 0, 1:3] = True  # one of the two largest, and not the first
    iou = mask_iou(maps, masks)
    assert iou[:2].tolist() == pytest.approx([1.0, 1 / 3])
    assert bool(iou[2].isnan())
    hits = pointing_game(maps, masks)
    assert hits[:2].tolist() == [1.0, 0.0]
    assert bool(hits[2].isnan())
    inside = mass_inside(maps, masks)
    assert inside[:2].tolist() == pytest.approx([5 / 6 * 8, 2 / 6 * 8])


def test_channels_count_by_their_size() -> None:
    maps = torch.randn(2, 3, 4, 4)
    masks = maps.abs().mean(dim=1) > 1.0
    assert mask_iou(maps, masks).tolist() == [1.0, 1.0]
    with pytest.raises(ShapeError, match="bool"):
        mask_iou(maps, masks.float())
