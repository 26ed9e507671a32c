"""PyTorch path of ``mahalanobis``: blocks of rows that stay in the cache, columns in strips.

A strip of a triangular matrix is multiplied down to its last row that is not zero, which leaves out
half of the work; strips much narrower would leave out more and multiply more slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mahalanobis"]

_ROWS = {"cpu": 2048}  # rows at once: of 768 numbers, 6 MiB centred and as much whitened
_ROWS_ELSEWHERE = 65536
_STRIP = 128


def mahalanobis(x: Tensor, mean: Tensor, matrix: Tensor, triangular: bool) -> Tensor:
    """See :func:`cmd_plugin.kernels.mahalanobis`; ``mean`` and ``matrix`` have the dtype of it."""
    count, dim = x.shape
    columns = matrix.shape[1]
    size = min(max(count, 1), _ROWS.get(x.device.type, _ROWS_ELSEWHERE))
    strip = _STRIP if triangular else columns
    result = torch.empty(count, dtype=mean.dtype, device=x.device)
    centred = torch.empty(size, dim, dtype=mean.dtype, device=x.device)
    whitened = torch.empty(size, columns, dtype=mean.dtype, device=x.device)
    for start in range(0, count, size):
        rows = x[start : start + size]
        narrow, wide = centred[: len(rows)], whitened[: len(rows)]
        torch.sub(rows, mean, out=narrow)
        for left in range(0, columns, strip):
            right = min(left + strip, columns)
            below = right + dim - columns if triangular else dim
            torch.mm(narrow[:, :below], matrix[:below, left:right], out=wide[:, left:right])
        torch.sum(wide.square_(), dim=1, out=result[start : start + size])
    return result
