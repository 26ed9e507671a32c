"""The specification of :func:`cmd_plugin.kernels.knn`: all distances, one stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["knn"]


def knn(points: Tensor, queries: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Return ([B, M, k] positions, [B, M, k] squared distances) in the dtype of the points."""
    squared = (queries[:, :, None, :] - points[:, None, :, :]).square().sum(dim=3)
    if exclude_self:
        squared.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    ordered = squared.sort(dim=2, stable=True)
    return ordered.indices[:, :, :k], ordered.values[:, :, :k]
