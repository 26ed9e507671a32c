"""Partial clouds: patches, curves and random subsets around anchors (EPiC's three views).

Levi, Gilboa: *EPiC: Ensemble of Partial Point Clouds for Robust Classification* (ICCV 2023). A
patch keeps the full local resolution, a curve rarely walks into badly connected points such as
isolated outliers, a random subset is global; a corruption seldom spoils all three.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels import curve_walk, farthest_point_sampling, knn
from cmd_plugin.kernels._checks import require_clouds
from cmd_plugin.kernels.counter_random import CounterRandom, sample_index

__all__ = ["SIZES", "View", "anchor_points", "partial_clouds", "partial_positions"]

View = Literal["patch", "curve", "random"]
VIEWS: tuple[View, ...] = get_args(View)

SIZES: dict[View, int] = {"patch": 512, "curve": 512, "random": 128}
"""Points of a partial cloud in the paper, for clouds of 1024 points."""

_ANCHORS = 0x45500000  # purposes of this module's random numbers
_SUBSETS = 0x45510000


def anchor_points(
    points: Tensor,
    count: int,
    *,
    random: bool = False,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Return the points that partial clouds grow from.

    Args:
        points: [B, N, 3], floating point, finite.
        count: Number of anchors, at least 1; of clouds with fewer points, some serve twice.
        random: Draw them (training) instead of taking a farthest point sample from the cloud's
            first point (evaluation). Each cloud draws its own; in the authors' code a batch shares
            them.
        seed: In [0, 2^63); only used when drawing.
        index: [B] sample numbers, by default 0..B-1; only used when drawing.

    Returns:
        [B, count] int64 positions.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
        InputError: If the count is no positive integer.
    """
    require_clouds("points", points)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"the number of anchors must be at least 1, got {count!r}.")
    batch, size, _ = points.shape
    if random:
        number = sample_index(index, batch, points.device)
        return CounterRandom(seed, number, _ANCHORS).integers(count, size)
    # By name, so that the sample does not depend on which packages are installed.
    backend: Literal["auto", "torch"] = "torch" if points.device.type == "cpu" else "auto"
    picked = farthest_point_sampling(points, min(count, size), backend=backend)
    return picked[:, torch.arange(count, device=points.device) % size]


def partial_positions(
    points: Tensor,
    view: View,
    anchors: Tensor,
    size: int,
    *,
    neighbours: int = 20,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Return which points of each cloud make up its partial clouds.

    - ``patch``: the ``size`` nearest neighbours of the anchor, itself included, nearest first.
    - ``curve``: a random walk from the anchor; every step goes to one of the ``neighbours - 1``
      nearest points of where it is (the count includes the point itself, as in the paper).
      Revisited points stay, as duplicates: 512 steps visit about 287 of 1024 points.
    - ``random``: ``size`` different points; anchors only say how many subsets are drawn.

    No part is larger than the cloud, as published; a cloud with fewer than ``neighbours`` points
    walks over all of them. A sample's draws depend on (seed, its number, anchor's place).

    Args:
        points: [B, N, 3], floating point, finite.
        view: ``"patch"``, ``"curve"`` or ``"random"``.
        anchors: [B, A] int64 positions.
        size: Points of a partial cloud, at least 1.
        neighbours: Nearest neighbours a curve may step to, the point itself counted; at least 2.
        seed: In [0, 2^63).
        index: [B] sample numbers, by default 0..B-1.

    Returns:
        [B, A, n] int64 positions, n = min(size, N).

    Raises:
        ShapeError: If shapes or dtypes do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
        InputError: If view, size, neighbours or seed cannot be used.
    """
    require_clouds("points", points)
    if view not in VIEWS:
        raise InputError(f"view {view!r} is unknown: use {', '.join(VIEWS)}.")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"the size of a partial cloud must be at least 1, got {size!r}.")
    if neighbours < 2:
        raise InputError(f"neighbours counts the point itself, so at least 2, got {neighbours}.")
    total = points.shape[1]
    size = min(size, total)
    number = sample_index(index, len(points), points.device)
    if view == "patch":
        centres = points.gather(1, anchors[:, :, None].expand(-1, -1, points.shape[2]))
        # A handful of rows: a tree over the whole cloud would cost more than their distances.
        backend: Literal["auto", "torch"] = "torch" if points.device.type == "cpu" else "auto"
        return knn(points, size, centres, backend=backend).positions
    if view == "curve":
        if total == 1:
            return anchors[:, :, None].expand(-1, -1, size).contiguous()
        table = knn(points, min(neighbours, total) - 1, exclude_self=True).positions
        return curve_walk(table, anchors, size, seed=seed, index=number)
    subsets = [
        CounterRandom(seed, number, _SUBSETS + place).permutation(total)[:, :size]
        for place in range(anchors.shape[1])
    ]
    return torch.stack(subsets, dim=1)


def partial_clouds(
    points: Tensor,
    view: View,
    anchors: Tensor,
    size: int,
    *,
    neighbours: int = 20,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Return the partial clouds [B, A, n, 3] themselves; see :func:`partial_positions`."""
    positions = partial_positions(
        points, view, anchors, size, neighbours=neighbours, seed=seed, index=index
    )
    batch, count, chosen = positions.shape
    rows = positions.reshape(batch, count * chosen, 1).expand(-1, -1, points.shape[2])
    return points.gather(1, rows).view(batch, count, chosen, points.shape[2])
