"""The specification of :func:`cmd_plugin.kernels.fold_gradients`: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fold_gradients"]


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    """Return [M] float64; see :func:`cmd_plugin.kernels.fold_gradients`."""
    part = scale[embedded].double() * gradient[embedded].double()
    sums = torch.stack([part[mode[embedded] == m].sum() for m in range(modes)])
    gradient[embedded] = 0.0
    return sums
