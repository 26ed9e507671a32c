"""Triton path of ``knn``: distances of a few rows in registers, then k times the smallest.

Reads each cloud once per block of rows and writes k positions and distances a row; no distance
matrix in memory. Distances are accumulated in float32 (float64 for float64 clouds), one axis after
the other.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["knn"]

_REGISTERS = 8192  # distances a program holds


@triton.jit
def _knn(
    points,
    queries,
    index,
    squared,
    size,
    asked,
    LARGEST: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
):
    cloud = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    points += cloud * size * C
    queries += cloud * asked * C
    far = float("inf")
    for axis in tl.static_range(C):
        q = tl.load(queries + row * C + axis, row < asked, 0.0)
        p = tl.load(points + column * C + axis, column < size, 0.0)
        offset = q[:, None] - p[None, :]
        if axis == 0:
            distance = offset * offset
        else:
            distance += offset * offset
    # A real distance that overflows must not look like a point that is gone.
    distance = tl.minimum(distance, LARGEST)
    distance = tl.where(column[None, :] < size, distance, far)
    if EXCLUDE_SELF:
        distance = tl.where(row[:, None] == column[None, :], far, distance)
    out = (cloud * asked + row) * K
    for rank in range(K):
        smallest = tl.min(distance, axis=1)
        # Of equally far points the lowest position.
        tied = tl.where(distance == smallest[:, None], column[None, :], COLUMNS)
        nearest = tl.min(tied, axis=1)
        tl.store(index + out + rank, nearest.to(tl.int64), row < asked)
        tl.store(squared + out + rank, smallest, row < asked)
        distance = tl.where(column[None, :] == nearest[:, None], far, distance)


def knn(points: Tensor, queries: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Return ([B, M, k] int64, [B, M, k] of the points' dtype)."""
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    cloud, asked = (t.detach().to(dtype).contiguous() for t in (points, queries))
    batch, size, axes = cloud.shape
    count = asked.shape[1]
    index = torch.empty(batch, count, k, dtype=torch.int64, device=points.device)
    squared = torch.empty(batch, count, k, dtype=dtype, device=points.device)
    columns = max(16, triton.next_power_of_2(size))
    rows = max(1, min(16, _REGISTERS // columns))
    if batch and count:
        on = torch.cuda.device(points.device) if points.is_cuda else nullcontext()
        with on:
            _knn[(triton.cdiv(count, rows), batch)](
                cloud,
                asked,
                index,
                squared,
                size,
                count,
                LARGEST=torch.finfo(dtype).max,
                C=axes,
                K=k,
                ROWS=rows,
                COLUMNS=columns,
                EXCLUDE_SELF=exclude_self,
                num_warps=4,
            )
    return index, squared.to(points.dtype)
