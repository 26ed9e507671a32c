"""Maps against masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cmd_plugin.distinction.masks import boxes_to_mask, mask_iou, mass_inside, pointing_game
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


@pytest.mark.parametrize("before", [(24, 24), (24, 40), (50, 20)])
def test_a_box_goes_where_pillow_puts_its_pixels(before: tuple[int, int]) -> None:
    """A white box in an image that is scaled and cropped covers the pixels that are marked."""
    height, width = before
    box = torch.tensor([[4.0, 3.0, width - 6.0, height - 9.0]])
    picture = np.zeros(before, dtype=np.uint8)
    picture[3 : height - 9, 4 : width - 6] = 255
    fitted = ImageOps.fit(Image.fromarray(picture), (12, 12), Image.Resampling.BOX)
    share = torch.from_numpy(np.array(fitted)) / 255.0
    marked = boxes_to_mask(box, before, (12, 12))
    assert bool(marked[share > 0.75].all())
    assert not bool(marked[share < 0.25].any())
    assert 0 < int(marked.sum()) < 144


def test_boxes_add_up_and_none_marks_nothing() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 1.0, 4.0, 2.0]])
    wanted = torch.zeros(3, 4, dtype=torch.bool)
    wanted[0, 0] = wanted[1, 2:] = True
    assert torch.equal(boxes_to_mask(boxes, (3, 4), (3, 4)), wanted)
    assert not bool(boxes_to_mask(torch.zeros(0, 4), (3, 4), (3, 4)).any())
