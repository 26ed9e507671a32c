"""Groups of images made alike in what is no evidence: their grey levels."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError

__all__ = ["match_histogram"]


def match_histogram(images: Tensor, like: Tensor) -> Tensor:
    """Give a group of images the pooled histogram of another, channel by channel.

    A small model tells its own samples from real images by their contrast alone; after this, it
    cannot. Equal values stay equal, and order is kept.

    Args:
        images: [N, C, H, W].
        like: [M, C, H, W], any M, H and W.

    Returns:
        [N, C, H, W] of the dtype of ``images``.

    Raises:
        ShapeError: If channels differ.
    """
    if images.ndim != 4 or like.ndim != 4 or images.shape[1] != like.shape[1]:
        raise ShapeError(
            f"groups must be [N, C, H, W] of equal C, got {tuple(images.shape)} and "
            f"{tuple(like.shape)}."
        )
    matched = torch.empty_like(images)
    for channel in range(images.shape[1]):
        _, place, count = torch.unique(
            images[:, channel].double(), return_inverse=True, return_counts=True
        )
        # Each value goes to the same quantile, the middle of the ranks it takes up.
        ranks = (count.cumsum(0) - 0.5 * count) / count.sum()
        known = like[:, channel].double().flatten().sort().values
        spot = (ranks * len(known)).long().clamp(max=len(known) - 1)
        matched[:, channel] = known[spot][place].to(images.dtype)
    return matched
