"""Refocusing: leave the points that dominate a network out, and ask it again.

A network overfocuses when few points win most of the pooled channels: added outliers do that. The
normalised entropy H of the counts says how many points to trust, k = floor(H N); the k points that
win the fewest channels are kept.

Source: Critical Points++ (arXiv 2308.05525, "Robustifying Point Cloud Networks by Refocusing").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError
from cmd_plugin.networks.measuring import undisturbed
from cmd_plugin.pointcloud._interception import (
    Forward,
    as_it_is,
    as_points,
    call_network,
    class_scores,
    inner_module,
)
from cmd_plugin.pointcloud.importance import PointImportance, point_importance

__all__ = [
    "Refocused",
    "importance_order",
    "kept_count",
    "kept_mask",
    "refocus",
    "uncritical_subset",
]

_SLACK = 1e-9  # H of evenly spread counts is 1 up to rounding, and then all points are kept


@dataclass(frozen=True)
class Refocused:
    """What a refocused network said.

    Attributes:
        output: [B, classes] of the second forward pass.
        kept: [B, N] bool, the points that entered it.
        importance: Of the first forward pass; its ``output`` is the plain network's.
    """

    output: Tensor
    kept: Tensor
    importance: PointImportance


def kept_count(entropy: Tensor, points: Tensor | int, minimum: int = 64) -> Tensor:
    """The adaptive threshold: k = floor(H N), at least ``minimum`` and at most N.

    Args:
        entropy: [B] normalised entropy H in [0, 1].
        points: N, or [B] the number of real points of each cloud.
        minimum: Fewest points to keep, such as the neighbours a graph needs; clouds that have
            fewer keep all.

    Returns:
        [B] int64.
    """
    total = torch.as_tensor(points, dtype=torch.int64, device=entropy.device).expand_as(entropy)
    wanted = (entropy.double() * total + _SLACK).floor().long()
    return torch.minimum(torch.maximum(wanted, total.clamp_max(minimum)), total)


def importance_order(importance: PointImportance, rank: str = "critical++") -> Tensor:
    """Points from the least to the most important, [B, N] int64; masked ones come last.

    Counts tie often, so the order is by count, then by norm, then by index: reproducible, unlike an
    unstable sort.

    Args:
        importance: Scores of the clouds.
        rank: ``critical++`` (counts) or ``fbi`` (norms).

    Raises:
        InputError: If the rank is unknown, or counts are asked for and there are none.
    """
    if rank not in ("critical++", "fbi"):
        raise InputError(f"unknown rank {rank!r}: choose critical++ or fbi.")
    order = importance.norm.argsort(dim=1, stable=True)
    if rank == "critical++":
        if importance.wins is None:
            raise InputError("these scores hold no counts: measure 'critical++', or rank 'fbi'.")
        by_count = importance.wins.gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, by_count)
    if importance.mask is not None:
        hidden = (~importance.mask).gather(1, order).to(torch.uint8)
        order = order.gather(1, hidden.argsort(dim=1, stable=True))
    return order


def kept_mask(order: Tensor, count: Tensor | int) -> Tensor:
    """[B, N] bool: the first ``count`` ([B] or a number) points of ``order`` [B, N]."""
    batch, total = order.shape
    count = torch.as_tensor(count, device=order.device).expand(batch)
    first = torch.arange(total, device=order.device) < count.unsqueeze(1)
    return torch.zeros_like(first).scatter_(1, order, first)


@torch.no_grad()
def refocus(
    model: nn.Module,
    points: Tensor,
    *,
    keep: Literal["entropy"] | int = "entropy",
    rank: Literal["critical++", "fbi"] = "critical++",
    minimum: int = 64,
    mask: Tensor | None = None,
    forward: Forward = as_it_is,
    pool: int | None = None,
    tokens: Tensor | None = None,
) -> Refocused:
    """Run a network twice: on all points, then on those that did not dominate.

    Works at inference on any trained network; clouds with outliers gain. Without training on
    uncritical subsets (:func:`uncritical_subset`), clouds that miss points lose accuracy.

    Clouds that keep different numbers of points run one by one in the second pass, because padding
    would change what graphs and means see. If the network samples tokens, H is that of its tokens,
    k = floor(H N) still counts points, and a point is dropped with the token nearest to it.

    Args:
        model: Any network with a global maximum.
        points: [B, N, C].
        keep: ``"entropy"`` for the adaptive threshold of each cloud, or a number of points.
        rank: Least important by counts (published) or by norms.
        minimum: Fewest points the adaptive threshold keeps.
        mask: [B, N] bool, True for real points. The second pass gets real points only.
        forward: How to call the network.
        pool: Which pool, if several feed the head.
        tokens: Coordinates of tokens, see :func:`point_importance`.

    Raises:
        InputError: As :func:`point_importance`, or if ``keep`` is not positive.
        ShapeError: If the network does not answer with one row of class scores for each cloud, as
            segmentation networks do not.
    """
    points = as_points(model, points)
    if keep != "entropy" and (not isinstance(keep, int) or keep < 1):
        raise InputError(f"keep must be 'entropy' or a positive number of points, got {keep!r}.")
    importance = point_importance(
        model, points, "critical++", mask=mask, forward=forward, pool=pool, tokens=tokens
    )
    assert importance.entropy is not None  # a measure that counts
    real: Tensor | int = points.shape[1] if mask is None else mask.sum(dim=1)
    if keep == "entropy":
        count = kept_count(importance.entropy, real, minimum)
    else:
        count = torch.as_tensor(real, device=points.device).expand(len(points)).clamp_max(keep)
    kept = kept_mask(importance_order(importance, rank), count)
    output = run_on(model, points, kept, forward)
    return Refocused(output, kept, importance)


def run_on(model: nn.Module, points: Tensor, kept: Tensor, forward: Forward = as_it_is) -> Tensor:
    """The network's output for the kept points of each cloud, in evaluation mode.

    Clouds that keep equally many points share a forward pass.

    Args:
        model: Any network.
        points: [B, N, C].
        kept: [B, N] bool.
        forward: How to call the network.

    Returns:
        [B, classes].

    Raises:
        ShapeError: If the output is not one row of class scores for each cloud.
    """
    network = inner_module(model)
    counts = kept.sum(dim=1)
    rows: list[Tensor | None] = [None] * len(points)
    with undisturbed(network, buffers=False):
        for clouds, subset in _equal_sized(points, kept, counts):
            output = class_scores(call_network(forward, network, subset), len(clouds))
            for cloud, row in zip(clouds.tolist(), output, strict=True):
                rows[cloud] = row
    return torch.stack([row for row in rows if row is not None])


def _equal_sized(points: Tensor, kept: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for count in sorted(set(counts.tolist())):
        clouds = (counts == count).nonzero().flatten()
        yield clouds, points[clouds][kept[clouds]].view(len(clouds), count, -1)


def uncritical_subset(
    model: nn.Module,
    points: Tensor,
    generator: torch.Generator,
    *,
    fewest: int = 256,
    forward: Forward = as_it_is,
    pool: int | None = None,
) -> Tensor:
    """Clouds without their most important points, to train on: one k for the whole batch.

    k is drawn uniformly from {fewest, ..., N - 1}. The present weights rank the points in
    evaluation mode and without gradients; running statistics are not updated by it.

    Args:
        model: The network being trained; its modes are left as they are.
        points: [B, N, C].
        generator: Random numbers of k, on the CPU.
        fewest: Smallest k; a quarter of N if the clouds are too small for it.
        forward: How to call the network.
        pool: Which pool, if several feed the head.

    Returns:
        [B, k, C].

    Raises:
        InputError: If the network has no global maximum, or clouds have fewer than two points.
    """
    total = points.shape[1]
    low = fewest if fewest < total else max(1, total // 4)
    if total < 2:
        raise InputError("clouds of a single point have no subset to train on.")
    count = int(torch.randint(low, total, (1,), generator=generator))
    importance = point_importance(model, points, "critical++", forward=forward, pool=pool)
    chosen = importance_order(importance)[:, :count].sort(dim=1).values
    return points.gather(1, chosen.unsqueeze(2).expand(-1, -1, points.shape[2]))
