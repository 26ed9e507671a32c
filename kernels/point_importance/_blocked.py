"""CPU path of ``point_importance``: one cloud at a time, so that it stays in the cache.

Over whole batches the intermediate |X| is written to fresh memory, which costs more than the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["norms", "wins"]


def norms(features: Tensor, mask: Tensor | None, order: float) -> Tensor:
    """See :func:`cmd_plugin.kernels.point_importance.reference.norms`."""
    batch, _, tokens = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    result = torch.empty(batch, tokens, dtype=dtype)
    scratch = torch.empty_like(features[0], dtype=dtype)
    for cloud, out in zip(features, result, strict=True):
        wide = cloud if cloud.dtype == dtype else scratch.copy_(cloud)
        if order == 2.0:
            torch.mul(wide, wide, out=scratch)
        else:
            torch.abs(wide, out=scratch)
        if order == float("inf"):
            torch.amax(scratch, dim=0, out=out)
        else:
            torch.sum(scratch, dim=0, out=out)
    if order == 2.0:
        result.sqrt_()
    return result if mask is None else result.masked_fill_(~mask, 0.0)


def wins(features: Tensor, mask: Tensor | None) -> Tensor:
    """See :func:`cmd_plugin.kernels.point_importance.reference.wins`, ``ties="first"``.

    On a CPU, torch returns the first of several equal maxima.
    """
    batch, _, tokens = features.shape
    result = torch.empty(batch, tokens, dtype=torch.int64)
    for number, cloud in enumerate(features):
        real = cloud if mask is None else cloud.masked_fill(~mask[number], -torch.inf)
        result[number] = real.argmax(dim=1).bincount(minlength=tokens)
    return result
