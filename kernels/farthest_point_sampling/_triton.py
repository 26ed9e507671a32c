"""Triton path of ``farthest_point_sampling``: one program per cloud, everything in registers.

Coordinates are read once; each pick is one pass over registers, one maximum over the program and
one load of the picked point.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["farthest_point_sampling"]


@triton.jit
def _sample(points, start, picked, size, count, COLUMNS: tl.constexpr):
    cloud = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < size
    points += cloud * size * 3
    x = tl.load(points + column * 3, inside, 0.0)
    y = tl.load(points + column * 3 + 1, inside, 0.0)
    z = tl.load(points + column * 3 + 2, inside, 0.0)
    # Padding lies below the -1 of picked points, which lies below every distance.
    nearest = tl.where(inside, x * 0.0 + float("inf"), -2.0)
    last = tl.load(start + cloud).to(tl.int32)
    for number in range(count):
        tl.store(picked + cloud * count + number, last.to(tl.int64))
        dx = x - tl.load(points + last * 3)
        dy = y - tl.load(points + last * 3 + 1)
        dz = z - tl.load(points + last * 3 + 2)
        squared = dx * dx
        squared += dy * dy
        squared += dz * dz
        nearest = tl.minimum(nearest, squared)
        nearest = tl.where(column == last, -1.0, nearest)
        farthest = tl.max(nearest, axis=0)
        # Of equally far points the lowest position.
        last = tl.min(tl.where(nearest == farthest, column, COLUMNS), axis=0)


def farthest_point_sampling(points: Tensor, count: int, start: Tensor) -> Tensor:
    """Return [B, count] int64 positions; see the public function for the arguments."""
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    clouds = points.detach().to(dtype).contiguous()
    batch, size, _ = clouds.shape
    picked = torch.empty(batch, count, dtype=torch.int64, device=points.device)
    columns = max(16, triton.next_power_of_2(size))
    if batch:
        on = torch.cuda.device(points.device) if points.is_cuda else nullcontext()
        with on:
            _sample[(batch,)](
                clouds,
                start.contiguous(),
                picked,
                size,
                count,
                COLUMNS=columns,
                num_warps=4 if columns <= 2048 else 16,
            )
    return picked
