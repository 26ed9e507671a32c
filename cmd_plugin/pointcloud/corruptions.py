"""The seven ModelNet-C corruptions at five levels, seeded and independent of the batch.

Recipes: Ren, Pan, Liu: *Benchmarking and Analyzing Point Cloud Classification under Corruptions*
(ICML 2022). The released test set was drawn with a seed nobody published, so what this module makes
is "ModelNet-C-style, seed s" and no official set; its owners ask not to mix the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels.counter_random import CounterRandom, sample_index

__all__ = ["CORRUPTIONS", "LEVELS", "Corruption", "corrupt", "shuffle_points"]

Corruption = Literal[
    "scale", "jitter", "rotate", "drop_global", "drop_local", "add_global", "add_local"
]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
LEVELS = 5

_POINTS = 1024  # number of points the recipes' counts are written for
_DROPPED = (0.25, 0.375, 0.5, 0.625, 0.75)
_CLUSTERS = 7  # the documents say 8; the published code draws from 1..7
_PURPOSE = (
    0x436F0000  # purposes of this module: _PURPOSE + 8 * corruption + level, then the shuffle
)
_SHUFFLE = _PURPOSE + 0x1000


def corrupt(
    points: Tensor,
    corruption: Corruption,
    level: int,
    *,
    seed: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Corrupt clouds the way ModelNet-C does.

    ============ ============================================================ =================
    corruption   what happens at level l                                      points, N = 1024
    ============ ============================================================ =================
    scale        axes times U(1/S, S), S = 1.6 + 0.1 l; back to the unit ball 1024
    jitter       N(0, (0.01 (l + 1))^2) on every coordinate                   1024
    rotate       angles U(-t, t) about x, y, z, t = pi/6 (l + 1)/5            1024
    drop_global  a random share 0.25, 0.375, 0.5, 0.625, 0.75 removed         768 ... 256
    drop_local   100 (l + 1) points removed in 1 to 7 places                  1024 - 100 (l+1)
    add_global   10 (l + 1) points uniform in the unit ball                   1024 + 10 (l+1)
    add_local    100 (l + 1) points in 1 to 7 Gaussian clusters               1024 + 100 (l+1)
    ============ ============================================================ =================

    Counts are written for 1024 points; for clouds of N points they are multiplied by N/1024 and
    rounded, which is the recipe itself at N = 1024 (our decision: without it level 4 would remove
    500 of 512 points). Only ``scale`` normalises again. Added points come **last**, as in the
    published files: call :func:`shuffle_points` before anything that depends on the order.

    Args:
        points: [B, N, 3] or [N, 3], float32 or float64, in the unit ball.
        corruption: One of :data:`CORRUPTIONS`.
        level: 0 (mild) to 4 (severe).
        seed: In [0, 2^63).
        index: [B] sample numbers, by default 0..B-1. A cloud's corruption is a function of its
            points, its number, the seed, the corruption and the level: give the position in the
            data set, and any batch gives the same clouds.

    Returns:
        [B, N', 3] or [N', 3], of the dtype and on the device of ``points``; a new tensor.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
        InputError: If corruption, level or seed is unknown.
    """
    if corruption not in CORRUPTIONS:
        raise InputError(f"corruption {corruption!r} is unknown: use {', '.join(CORRUPTIONS)}.")
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < LEVELS:
        raise InputError(f"level must be an integer in 0..{LEVELS - 1}, got {level!r}.")
    clouds, number = _checked(points, index)
    purpose = _PURPOSE + 8 * CORRUPTIONS.index(corruption) + level
    random = CounterRandom(seed, number, purpose)
    result = _RECIPES[corruption](clouds.double(), level, random).to(points.dtype)
    return result[0] if points.ndim == 2 else result


def shuffle_points(points: Tensor, *, seed: int = 0, index: Tensor | None = None) -> Tensor:
    """Return the clouds with their points in a random order, one order per (seed, sample number).

    Args:
        points: [B, N, 3] or [N, 3], float32 or float64.
        seed: In [0, 2^63).
        index: [B] sample numbers, by default 0..B-1.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
    """
    clouds, number = _checked(points, index)
    order = CounterRandom(seed, number, _SHUFFLE).permutation(clouds.shape[1])
    result = _take(clouds, order)
    return result[0] if points.ndim == 2 else result


def _checked(points: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the clouds as [B, N, 3] and their numbers as [B] int64."""
    if points.ndim not in (2, 3) or points.shape[-1] != 3 or not points.shape[-2]:
        raise ShapeError(f"points must be [B, N, 3] or [N, 3], got {tuple(points.shape)}.")
    if points.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"points must be float32 or float64, got {points.dtype}.")
    clouds = points if points.ndim == 3 else points[None]
    bad = int((~clouds.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"points hold {bad} NaN or infinite coordinates: remove them first.")
    return clouds, sample_index(index, len(clouds), clouds.device)


def _take(clouds: Tensor, order: Tensor) -> Tensor:
    return clouds.gather(1, order[:, :, None].expand(-1, -1, 3))


def _scaled(count: float, points: int) -> int:
    """Return a count written for 1024 points, for clouds of ``points``; at least 1."""
    return max(1, round(count * points / _POINTS))


# Every recipe takes [B, N, 3] float64, the level and the samples' random numbers. Sums run over
# the innermost axis or over three written-out terms: a matrix product's rounding may change with
# the size of the batch.
def _scale(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    largest = 1.6 + 0.1 * level
    factor = 1 / largest + (largest - 1 / largest) * random.uniform(3)
    rows = (clouds * factor[:, None, :]).mT.contiguous()
    rows = rows - rows.mean(dim=2, keepdim=True)
    radius = rows.square().sum(dim=1).amax(dim=1).sqrt()
    if bool((radius == 0).any()):
        raise InputError("a cloud has all its points in one place: scale needs an extent.")
    return (rows / radius[:, None, None]).mT.contiguous()


def _jitter(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    noise = random.normal(clouds.shape[1] * 3).view_as(clouds)
    return clouds + 0.01 * (level + 1) * noise


def _rotate(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    largest = math.pi / 6 * (level + 1) / 5
    angles = largest * (2 * random.uniform(3) - 1)
    (sa, sb, sc), (ca, cb, cc) = angles.sin().T, angles.cos().T
    # R = Rz(c) Ry(b) Rx(a), applied to rows: p <- p R
    rotation = (
        (cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa),
        (sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa),
        (-sb, cb * sa, cb * ca),
    )
    x, y, z = clouds.unbind(2)
    columns = [
        x * rotation[0][j][:, None] + y * rotation[1][j][:, None] + z * rotation[2][j][:, None]
        for j in range(3)
    ]
    return torch.stack(columns, dim=2)


def _drop_global(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    size = clouds.shape[1]
    kept = max(1, int(size * (1 - _DROPPED[level])))
    return _take(clouds, random.permutation(size)[:, :kept])


def _cluster_sizes(count: int, random: CounterRandom) -> Tensor:
    """Return [B, 7] sizes that sum to ``count``: balls thrown into 1..7 urns per sample."""
    clusters = 1 + random.integers(1, _CLUSTERS)
    urn = random.integers(count, clusters)
    sizes = torch.zeros(len(urn), _CLUSTERS, dtype=torch.int64, device=urn.device)
    return sizes.scatter_add_(1, urn, torch.ones_like(urn))


def _drop_local(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    batch, size, _ = clouds.shape
    sizes = _cluster_sizes(min(size - 1, _scaled(100 * (level + 1), size)), random)
    left = torch.ones(batch, size, dtype=torch.bool, device=clouds.device)
    ranks = torch.arange(size, device=clouds.device).expand(batch, size)
    for cluster in range(_CLUSTERS):
        # The pick-th point that is left: the first whose running count exceeds pick.
        pick = random.integers(1, left.sum(dim=1, keepdim=True))
        centre = (left.cumsum(dim=1) > pick).byte().argmax(dim=1, keepdim=True)
        offset = clouds - _take(clouds, centre)
        distance = offset.square().sum(dim=2).masked_fill(~left, math.inf)
        # Rank of every point by (distance, position); the first ones go.
        rank = torch.empty_like(ranks).scatter_(1, distance.argsort(dim=1, stable=True), ranks)
        left &= rank >= sizes[:, cluster, None]
    return clouds[left].view(batch, -1, 3)


def _add_global(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    count = _scaled(10 * (level + 1), clouds.shape[1])
    direction = random.normal(count * 3).view(-1, count, 3)
    radius = random.uniform(count) ** (1 / 3)
    added = direction * (radius / direction.norm(dim=2))[:, :, None]
    return torch.cat([clouds, added], dim=1)


def _add_local(clouds: Tensor, level: int, random: CounterRandom) -> Tensor:
    size = clouds.shape[1]
    count = _scaled(100 * (level + 1), size)
    sizes = _cluster_sizes(count, random)
    # Of a cloud with fewer points than clusters, some point is the centre of several.
    centres = _take(clouds, random.permutation(size)[:, torch.arange(_CLUSTERS) % size])
    spread = 0.075 + 0.05 * random.uniform(_CLUSTERS)
    ends = sizes.cumsum(dim=1)
    position = torch.arange(count, device=clouds.device).expand(len(clouds), count)
    cluster = torch.searchsorted(ends, position.contiguous(), right=True)
    offset = random.normal(count * 3).view(-1, count, 3)
    added = _take(centres, cluster) + offset * spread.gather(1, cluster)[:, :, None]
    square = added.square().sum(dim=2, keepdim=True)
    # A point outside the unit ball is mirrored into it: radius r becomes 1/r.
    return torch.cat([clouds, torch.where(square > 1, added / square, added)], dim=1)


_RECIPES: dict[Corruption, Callable[[Tensor, int, CounterRandom], Tensor]] = {
    "scale": _scale,
    "jitter": _jitter,
    "rotate": _rotate,
    "drop_global": _drop_global,
    "drop_local": _drop_local,
    "add_global": _add_global,
    "add_local": _add_local,
}
