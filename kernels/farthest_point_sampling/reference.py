"""The specification of :func:`cmd_plugin.kernels.farthest_point_sampling`, and its torch path.

All clouds of a batch advance together, one pick at a time: N distances per cloud and pick.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["farthest_point_sampling"]


def farthest_point_sampling(points: Tensor, count: int, start: Tensor) -> Tensor:
    """Return [B, count] int64 positions; see the public function for the arguments."""
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    axes = points.detach().to(dtype).permute(2, 0, 1).contiguous()  # [C, B, N]
    picked = torch.empty(len(start), count, dtype=torch.int64, device=points.device)
    nearest = torch.full(axes.shape[1:], torch.inf, dtype=dtype, device=points.device)
    last = start[:, None]
    for number in range(count):
        picked[:, number] = last[:, 0]
        if number + 1 == count:
            break
        squared = torch.zeros_like(nearest)
        for coordinate in axes:
            offset = coordinate - coordinate.gather(1, last)
            squared += offset * offset  # axis by axis: no batch changes the rounding
        nearest = torch.minimum(nearest, squared)
        nearest.scatter_(1, last, -1.0)  # below every distance: not picked again
        last = nearest.argmax(dim=1, keepdim=True)
    return picked
