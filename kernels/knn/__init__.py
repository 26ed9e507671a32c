"""The nearest neighbours of every point of a cloud, ties in a stated order."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels._checks import require_clouds
from cmd_plugin.kernels._dispatch import choose
from cmd_plugin.kernels.knn import _cpu

__all__ = ["Neighbours", "knn"]

_TREE_AXES = 8  # above, a k-d tree visits nearly all points
_TRITON_AXES, _TRITON_POINTS = 16, 8192  # one row of distances stays in a program's registers


class Neighbours(NamedTuple):
    """The k nearest points of M queries, nearest first.

    Attributes:
        positions: [B, M, k] int64, in the cloud.
        squared: [B, M, k] squared distances.
    """

    positions: Tensor
    squared: Tensor


def knn(
    points: Tensor,
    k: int,
    queries: Tensor | None = None,
    *,
    exclude_self: bool = False,
    backend: Literal["auto", "torch", "scipy", "triton"] = "auto",
) -> Neighbours:
    r"""Return the k points nearest to every query.

    .. math:: d^2_{mn} = \sum_c (q_{mc} - p_{nc})^2

    sorted by :math:`(d^2, n)`: of equally far points the one with the lower position comes first,
    so grids and duplicates give one answer on every backend. (Distances are float64 on CPUs and
    float32 on GPUs, so pairs that differ by rounding only may swap between the two.)

    Args:
        points: [B, N, C], floating point, finite.
        k: Number of neighbours, 1..N (1..N-1 with ``exclude_self``).
        queries: [B, M, C]; by default the points themselves.
        exclude_self: Leave out of every row the point with the query's own position. Its duplicates
            stay. Needs ``queries=None``.
        backend: ``"scipy"`` (k-d tree; CPU, C <= 8), ``"triton"`` (CUDA, N <= 8192, C <= 16),
            ``"torch"`` (anywhere; memory bounded by blocks of rows), or ``"auto"``.

    Raises:
        ShapeError: If shapes or dtypes do not fit, or k is out of range.
        NonFiniteError: If a coordinate is NaN or infinite.
        InputError: If the backend cannot run on these clouds.
    """
    require_clouds("points", points)
    batch, size, axes = points.shape
    if queries is not None:
        require_clouds("queries", queries)
        if queries.shape[0] != batch or queries.shape[2] != axes or queries.dtype != points.dtype:
            raise ShapeError(
                f"queries must be [{batch}, M, {axes}] {points.dtype}, got "
                f"{tuple(queries.shape)} {queries.dtype}."
            )
        if exclude_self:
            raise InputError("exclude_self leaves a point out of its own row: give no queries.")
    most = size - exclude_self
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise ShapeError(f"k must be in 1..{most} for clouds of {size} points, got {k!r}.")
    backend_used = choose(
        "knn",
        backend,
        points.device,
        library="scipy" if axes <= _TREE_AXES else None,
        triton=axes <= _TRITON_AXES and size <= _TRITON_POINTS,
        triton_limit=f"takes up to {_TRITON_POINTS} points and {_TRITON_AXES} axes there",
    )
    asked = points if queries is None else queries
    if backend_used == "triton":
        # Imported here: only who has a GPU needs Triton.
        from cmd_plugin.kernels.knn import _triton

        return Neighbours(*_triton.knn(points, asked, k, exclude_self))
    search = _cpu.by_tree if backend_used == "scipy" else _cpu.by_rows
    rows = [
        search(cloud, query, k, exclude_self) for cloud, query in zip(points, asked, strict=True)
    ]
    if not rows:
        empty = points.new_empty(0, asked.shape[1], k)
        return Neighbours(empty.long(), empty)
    positions, squared = (torch.stack(part) for part in zip(*rows, strict=True))
    return Neighbours(positions, squared.to(points.dtype))
