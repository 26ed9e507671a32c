"""The specification of :func:`cmd_plugin.kernels.mahalanobis`: plain PyTorch, any device."""

from __future__ import annotations

from torch import Tensor

__all__ = ["mahalanobis"]


def mahalanobis(x: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Return [N] squared norms of the centred rows of ``x`` [N, d] times ``matrix`` [d, r]."""
    return ((x.to(mean.dtype) - mean) @ matrix).square().sum(dim=1)
