"""The specification of :func:`cmd_plugin.kernels.snapshot_delta`: plain PyTorch on flat vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["snapshot_delta"]


def snapshot_delta(
    weights: Tensor, base: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return [N] differences; ``weights`` [N] is a plain vector here."""
    if base is None:
        return weights.to(dtype)
    return (weights.to(base.dtype) - base).to(dtype)
