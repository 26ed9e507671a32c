"""The specification of :func:`cmd_plugin.kernels.point_importance`: plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["norms", "wins"]


def norms(features: Tensor, mask: Tensor | None, order: float) -> Tensor:
    """Return [B, M] norms over the channels of ``features`` [B, F, M], 0 where masked out."""
    wide = features if features.dtype == torch.float64 else features.float()
    result: Tensor = torch.linalg.vector_norm(wide, order, dim=1)
    return result if mask is None else result.masked_fill(~mask, 0.0)


def wins(features: Tensor, mask: Tensor | None, ties: str) -> Tensor:
    """Return [B, M] how many channels each token wins."""
    batch, _, tokens = features.shape
    if mask is not None:
        features = features.masked_fill(~mask.unsqueeze(1), -torch.inf)
    best = features == features.amax(dim=2, keepdim=True)
    if ties == "split":
        return (best / best.sum(dim=2, keepdim=True)).sum(dim=1)
    number = torch.arange(tokens, device=features.device)
    first = number.masked_fill(~best, tokens).amin(dim=2)
    counts = torch.zeros(batch, tokens, dtype=torch.int64, device=features.device)
    return counts.scatter_add_(1, first, torch.ones_like(first))
