"""Points that do not belong: scores, removal, and the statistical removal to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.kernels.counter_random import check_seed
from cmd_plugin.pointcloud._interception import Forward, as_it_is, as_points
from cmd_plugin.pointcloud.importance import point_importance
from cmd_plugin.pointcloud.refocusing import importance_order, kept_count, kept_mask

__all__ = [
    "OutlierRanking",
    "outlier_ranking",
    "remove_outliers",
    "statistical_outliers",
    "statistical_scores",
]

_RANKED = ("counts", "norms", "statistical")
_TELLING = 0.7  # AUROC of counts from which removing by counts is advised


@dataclass(frozen=True)
class OutlierRanking:
    """How well scores rank planted outliers above a cloud's own points: AUROC, .5 is chance.

    Attributes:
        counts: By channels won (``critical++``).
        norms: By FBI.
        statistical: By :func:`statistical_scores`, which needs no network.
        planted: Outliers planted in each cloud.
    """

    counts: float
    norms: float
    statistical: float
    planted: int

    @property
    def counts_tell(self) -> bool:
        """Whether counts rank outliers well enough (.7) to remove points or refocus by them."""
        return self.counts >= _TELLING


def outlier_ranking(
    model: nn.Module,
    points: Tensor,
    *,
    planted: int = 10,
    draws: int = 4,
    seed: int = 0,
    forward: Forward = as_it_is,
    pool: int | None = None,
) -> OutlierRanking:
    """Plant outliers in clean clouds and ask how well the network's scores find them.

    On a PointNet, counts find outliers; on others they may not (on SLNet, AUROC .465, and
    refocusing then costs accuracy): measure before you refocus or remove points. Outliers are
    uniform in the ball around each cloud's mean that reaches its farthest point.

    Args:
        model: Any network with a global maximum.
        points: [B, N, C] clean clouds; one is enough. Channels beyond three are copied from the
            cloud's first point.
        planted: Outliers in each cloud.
        draws: How often they are planted in each cloud.
        seed: Of the outliers, in [0, 2^63).
        forward: How to call the network.
        pool: Which pool, if several feed the head.

    Raises:
        InputError: If a number is not positive, or as :func:`point_importance`.
    """
    from scipy.stats import rankdata

    if planted < 1 or draws < 1:
        raise InputError(f"planted and draws must be at least 1, got {planted} and {draws}.")
    points = as_points(model, points)
    generator = torch.Generator().manual_seed(check_seed(seed))
    found: list[dict[str, float]] = []
    total = points.shape[1]
    for _ in range(draws):
        clouds = torch.cat((points, _strays(points, planted, generator)), dim=1)
        seen = point_importance(model, clouds, "critical++", forward=forward, pool=pool)
        scores = torch.stack((seen.scores, seen.norm, statistical_scores(clouds)), dim=1)
        # The sum of ranks says how many pairs are in order; ties count half.
        ranks = rankdata(scores.double().cpu().numpy(), axis=-1)
        above = ranks[..., total:].sum(axis=-1) - planted * (planted + 1) / 2
        found += [
            dict(zip(_RANKED, row, strict=True)) for row in (above / (planted * total)).tolist()
        ]
    mean = {name: sum(row[name] for row in found) / len(found) for name in _RANKED}
    return OutlierRanking(mean["counts"], mean["norms"], mean["statistical"], planted)


def _strays(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[B, count, C] uniform in the ball around each cloud's mean that holds it."""
    batch = len(points)
    places = points[..., :3]
    centre = places.mean(dim=1, keepdim=True)
    radius = (places - centre).norm(dim=2).amax(dim=1).view(batch, 1, 1)
    direction = torch.randn(batch, count, 3, generator=generator)
    length = torch.rand(batch, count, 1, generator=generator).pow(1.0 / 3.0)
    offset = (torch.nn.functional.normalize(direction, dim=2) * length).to(points)
    strays = points[:, :1].expand(-1, count, -1).clone()
    strays[..., :3] = centre + radius * offset
    return strays


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
    pool: int | None = None,
) -> Tensor:
    """Let a network say which points do not belong: those that dominate it, [B, N] bool to keep.

    Meant for clouds that are suspected of outliers: a clean cloud loses its most informative
    points. With a PointNet, counts tell planted outliers better than norms do
    (``benchmarks/results/point_importance.json``); on other networks they may tell nothing, so ask
    :func:`outlier_ranking` first.

    Args:
        model: Any network with a global maximum.
        points: [B, N, C].
        method: Score by counts or by norms.
        share: Share of the points to remove, in [0, 1); by default 1 - H of each cloud, as in
            refocusing.
        minimum: Fewest points to keep.
        mask: [B, N] bool, True for real points; the others are never kept.
        forward: How to call the network.
        pool: Which pool, if several feed the head.

    Raises:
        InputError: If ``share`` is out of range, or as :func:`point_importance`.
    """
    if share is not None and not 0.0 <= share < 1.0:
        raise InputError(f"share must be at least 0 and below 1, got {share}.")
    importance = point_importance(
        model, points, "critical++", mask=mask, forward=forward, pool=pool
    )
    assert importance.entropy is not None  # a measure that counts
    real: Tensor | int = points.shape[1] if mask is None else mask.sum(dim=1)
    wanted = importance.entropy if share is None else torch.full_like(importance.entropy, 1 - share)
    return kept_mask(importance_order(importance, method), kept_count(wanted, real, minimum))
