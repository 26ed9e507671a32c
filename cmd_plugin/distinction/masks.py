"""Maps as segmentations: how well they point at what a person, or we ourselves, have marked."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError

__all__ = ["boxes_to_mask", "mask_iou", "mass_inside", "pointing_game"]


def mask_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Overlap of each mask with as many of the map's largest pixels as the mask has.

    Args:
        maps: [B, C, H, W], of which the mean size over channels counts.
        masks: [B, H, W] bool.

    Returns:
        Intersection over union, [B] float64; NaN where the mask is empty.
    """
    size, marked = _flat(maps, masks)
    order = size.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = marked.sum(dim=1, keepdim=True)
    top = order < count
    return (top & marked).sum(dim=1).double() / (top | marked).sum(dim=1)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the map's largest pixel lies in the mask: [B] float64; NaN where it is empty."""
    size, marked = _flat(maps, masks)
    hit = marked.gather(1, size.argmax(dim=1, keepdim=True))[:, 0].double()
    return torch.where(marked.any(dim=1), hit, torch.nan)


def mass_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map inside the mask over the share of the mask: 1 for an even map, [B] float64.

    NaN where the mask or the map is empty.
    """
    size, marked = _flat(maps, masks)
    inside = (size * marked).sum(dim=1) / size.sum(dim=1)
    return inside / marked.double().mean(dim=1)


def boxes_to_mask(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Mark the pixels of a scaled and centre-cropped image whose centres lie in a box.

    Args:
        boxes: Left, top, right and bottom in pixels of the image as it was, [M, 4]; M may be 0.
        before: Height and width of the image as it was.
        after: Height and width it was scaled and cropped to.

    Returns:
        [H, W] bool; empty where the crop left the boxes out.
    """
    scale = max(after[0] / before[0], after[1] / before[1])
    inside = []
    for axis, (was, now) in enumerate(zip(before, after, strict=True)):
        centres = (torch.arange(now, dtype=torch.float64) + 0.5) / scale + (was - now / scale) / 2.0
        low, high = boxes[:, 1 - axis, None], boxes[:, 3 - axis, None]
        inside.append((low <= centres) & (centres < high))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :]).any(dim=0)


def _flat(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if maps.ndim != 4 or masks.shape != (len(maps), *maps.shape[2:]) or masks.dtype != torch.bool:
        raise ShapeError(
            f"maps {tuple(maps.shape)} and masks {masks.dtype} {tuple(masks.shape)} do not go "
            "together: give [B, C, H, W] and bool [B, H, W]."
        )
    return maps.double().abs().mean(dim=1).flatten(1), masks.flatten(1)
