"""What the networks ask of a cloud: nearest neighbours, spread-out points, points within a ball."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmd_plugin.kernels import farthest_point_sampling

__all__ = ["ball_query", "farthest_points", "gather_points", "nearest"]


def nearest(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices of the k nearest points of every query, nearest first.

    Args:
        queries: [B, Q, C] floating point.
        points: [B, N, C].
        k: How many; at most N are returned.

    Returns:
        [B, Q, min(k, N)] int64.
    """
    # The product form of cdist loses the small distances of a tight cloud to cancellation.
    exact = "donot_use_mm_for_euclid_dist" if queries.shape[-1] <= 3 else "use_mm_for_euclid_dist"
    distance = torch.cdist(queries, points, compute_mode=exact)
    return distance.topk(min(k, points.shape[1]), dim=2, largest=False).indices


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Indices of a greedy farthest point sample that starts at index 0.

    Args:
        points: [B, N, 3].
        count: How many; at most N are returned.

    Returns:
        [B, min(count, N)] int64, in the order they were picked.
    """
    # A library may break ties otherwise; a network must answer alike whatever is installed.
    backend: Literal["auto", "torch"] = "auto" if points.is_cuda else "torch"
    return farthest_point_sampling(points.detach(), min(count, points.shape[1]), backend=backend)


def ball_query(centres: Tensor, points: Tensor, radius: float, count: int) -> Tensor:
    """The first points, by index, within a ball around each centre, as PointNet++ groups them.

    A ball with fewer than ``count`` points is filled with its first one; an empty ball (which a
    centre taken from the points never has) gets the nearest point.

    Args:
        centres: [B, Q, 3].
        points: [B, N, 3].
        radius: Radius in the unit of the points.
        count: Points in a group; at most N are returned.

    Returns:
        [B, Q, min(count, N)] int64.
    """
    total = points.shape[1]
    distance = torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist")
    number = torch.arange(total, device=points.device).expand_as(distance)
    inside = number.masked_fill(distance > radius, total)
    first = inside.topk(min(count, total), dim=2, largest=False, sorted=True).values
    start = torch.where(
        first[..., :1] == total, distance.argmin(dim=2, keepdim=True), first[..., :1]
    )
    return torch.where(first == total, start, first)


def gather_points(features: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, N, C] chosen by an int64 index [B, ...]: [B, ..., C]."""
    batch, _, channels = features.shape
    flat = index.reshape(batch, -1, 1).expand(-1, -1, channels)
    return features.gather(1, flat).reshape(*index.shape, channels)
