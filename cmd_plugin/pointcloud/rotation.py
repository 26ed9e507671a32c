"""Does a network look at the same points of a cloud when the cloud is turned?"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud._interception import Forward, as_it_is
from cmd_plugin.pointcloud.importance import point_importance

__all__ = ["rank_correlation", "rotation_consistency", "turned"]


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row, ties sharing their mean rank.

    Args:
        a: [B, N].
        b: [B, N].

    Returns:
        [B] float64 in [-1, 1]; 0 where a row is constant.

    Raises:
        ShapeError: If the shapes differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ShapeError(f"both must be [B, N], got {tuple(a.shape)} and {tuple(b.shape)}.")
    first, second = _ranks(a), _ranks(b)
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    norm = first.norm(dim=1) * second.norm(dim=1)
    product = (first * second).sum(dim=1)
    return torch.where(norm > 0, product / norm.clamp_min(1e-300), torch.zeros_like(norm))


def _ranks(x: Tensor) -> Tensor:
    ordered = x.contiguous().sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, x.contiguous(), right=False)
    above = torch.searchsorted(ordered, x.contiguous(), right=True)
    return (below + above).double() / 2.0


def turned(points: Tensor, angles: Tensor, axis: int = 2) -> Tensor:
    """Clouds [B, N, C] turned about one axis by [B] angles in radians; extra channels stay."""
    if not 0 <= axis <= 2:
        raise InputError(f"axis must be 0, 1 or 2, got {axis}.")
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    result = points.clone()
    result[..., first] = cos * points[..., first] - sin * points[..., second]
    result[..., second] = sin * points[..., first] + cos * points[..., second]
    return result


def rotation_consistency(
    model: nn.Module,
    points: Tensor,
    generator: torch.Generator,
    *,
    axis: int = 2,
    forward: Forward = as_it_is,
    pool: int | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Rank correlation of each cloud's FBI scores with those after a random turn, [B] float64.

    Args:
        model: Any network.
        points: [B, N, C].
        generator: Random numbers of the angles, on the CPU.
        axis: Axis to turn about.
        forward: How to call the network.
        pool: Which pool, if several feed the head.
        scores: [B, N] scores of the clouds as they are, if known.
    """
    if scores is None:
        scores = point_importance(model, points, forward=forward, pool=pool).scores
    angles = 2.0 * math.pi * torch.rand(len(points), generator=generator)
    moved = turned(points, angles.to(points.device, points.dtype), axis)
    after = point_importance(model, moved, forward=forward, pool=pool).scores
    return rank_correlation(scores, after)
