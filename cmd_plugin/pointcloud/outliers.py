"""Points that do not belong: scores, removal, and the statistical removal to compare with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud._interception import Forward, as_it_is
from cmd_plugin.pointcloud.importance import point_importance
from cmd_plugin.pointcloud.refocusing import importance_order, kept_count, kept_mask

__all__ = ["remove_outliers", "statistical_outliers", "statistical_scores"]


def statistical_scores(points: Tensor, k: int = 2) -> Tensor:
    """Mean squared distance of each point to its k nearest others, [B, N]; larger is lonelier.

    Args:
        points: [B, N, C]; the first three channels count.
        k: Neighbours, the point itself not counted; at most N - 1.
    """
    places = points[..., :3]
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    # Its own distance is one of the zeros, whichever of coincident points comes first.
    nearest = distance.topk(min(k + 1, points.shape[1]), dim=2, largest=False).values[..., 1:]
    if nearest.shape[2] == 0:
        return torch.zeros_like(places[..., 0])
    return nearest.square().mean(dim=2)


def statistical_outliers(points: Tensor, k: int = 2, alpha: float = 1.1) -> Tensor:
    """Statistical outlier removal: which points to keep, [B, N] bool.

    A point goes if its score lies more than ``alpha`` standard deviations above the cloud's mean.
    Defaults are those of the published defence baseline (Zhou et al., DUP-Net).

    Args:
        points: [B, N, C].
        k: Neighbours.
        alpha: Standard deviations.
    """
    scores = statistical_scores(points, k)
    limit = scores.mean(dim=1, keepdim=True) + alpha * scores.std(dim=1, keepdim=True)
    return scores <= limit


def remove_outliers(
    model: nn.Module,
    points: Tensor,
    *,
    method: Literal["critical++", "fbi"] = "critical++",
    share: float | None = None,
    minimum: int = 64,
    mask: Tensor | None = None,
    forward: Forward = as_it_is,
) -> Tensor:
    """Let a network say which points do not belong: those that dominate it, [B, N] bool to keep.

    Meant for clouds that are suspected of outliers: a clean cloud loses its most informative
    points. On real shapes, counts tell planted outliers better than norms do
    (``benchmarks/results/point_importance.json``).

    Args:
        model: Any network with a global maximum.
        points: [B, N, C].
        method: Score by counts or by norms.
        share: Share of the points to remove, in [0, 1); by default 1 - H of each cloud, as in
            refocusing.
        minimum: Fewest points to keep.
        mask: [B, N] bool, True for real points; the others are never kept.
        forward: How to call the network.

    Raises:
        InputError: If ``share`` is out of range, or as :func:`point_importance`.
    """
    if share is not None and not 0.0 <= share < 1.0:
        raise InputError(f"share must be at least 0 and below 1, got {share}.")
    importance = point_importance(model, points, "critical++", mask=mask, forward=forward)
    assert importance.entropy is not None  # a measure that counts
    real: Tensor | int = points.shape[1] if mask is None else mask.sum(dim=1)
    wanted = importance.entropy if share is None else torch.full_like(importance.entropy, 1 - share)
    return kept_mask(importance_order(importance, method), kept_count(wanted, real, minimum))
