"""What the networks ask of a cloud: nearest neighbours, spread-out points, points within a ball."""

from __future__ import annotations

import torch
from torch import Tensor

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
    batch, total, _ = points.shape
    count = min(count, total)
    picked = torch.zeros(batch, count, dtype=torch.int64, device=points.device)
    distance = torch.full((batch, total), torch.inf, dtype=points.dtype, device=points.device)
    for step in range(1, count):
        last = points.gather(1, picked[:, step - 1, None, None].expand(-1, 1, 3))
        distance = torch.minimum(distance, (points - last).square().sum(dim=2))
        picked[:, step] = distance.argmax(dim=1)
    return picked


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
