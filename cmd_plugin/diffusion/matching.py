"""Groups of images made alike in what is no evidence, and what their pixels alone say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError

__all__ = ["content_statistics", "match_histogram", "match_levels", "nearest_distance"]


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
    _check_groups(images, like)
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


def match_levels(images: Tensor, like: Tensor) -> Tensor:
    """Round a group of images to the grey levels that occur in another, channel by channel.

    Real images often have few levels, and samples of a model have all: counting them tells the
    groups apart and says nothing of the pictures.

    Args:
        images: [N, C, H, W].
        like: [M, C, H, W], any M, H and W.

    Returns:
        [N, C, H, W] of the dtype of ``images``: of each value the nearest that occurs, of two as
        near the lower.

    Raises:
        ShapeError: If channels differ.
    """
    _check_groups(images, like)
    matched = torch.empty_like(images)
    for channel in range(images.shape[1]):
        known = torch.unique(like[:, channel].double())
        middles = (known[1:] + known[:-1]) / 2.0
        place = torch.searchsorted(middles, images[:, channel].double().contiguous())
        matched[:, channel] = known[place].to(images.dtype)
    return matched


def content_statistics(images: Tensor) -> dict[str, Tensor]:
    """Return what pixels alone say of images: controls that need no model.

    Args:
        images: [N, C, H, W] in [-1, 1].

    Returns:
        ``"norm"``, the root of the mean square, and ``"total_variation"``, the mean difference of
        neighbouring pixels, [N] float64 each.
    """
    wide = images.double()
    down, across = wide.diff(dim=-2).abs(), wide.diff(dim=-1).abs()
    return {
        "norm": wide.flatten(1).square().mean(1).sqrt(),
        "total_variation": (down.flatten(1).sum(1) + across.flatten(1).sum(1))
        / (down[0].numel() + across[0].numel()),
    }


def nearest_distance(images: Tensor, known: Tensor) -> Tensor:
    """Return how far each image is from the nearest of others, [N] float64.

    Args:
        images: [N, ...].
        known: [M, ...], of the same trailing shape.

    Returns:
        Root of the mean square of the difference.
    """
    one, other = images.double().flatten(1), known.double().flatten(1)
    found: Tensor = torch.cdist(one, other).amin(1)
    return found / math.sqrt(one.shape[1])


def _check_groups(images: Tensor, like: Tensor) -> None:
    if images.ndim != 4 or like.ndim != 4 or images.shape[1] != like.shape[1]:
        raise ShapeError(
            f"groups must be [N, C, H, W] of equal C, got {tuple(images.shape)} and "
            f"{tuple(like.shape)}."
        )
