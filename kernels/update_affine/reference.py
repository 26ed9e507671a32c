"""The specification of :func:`cmd_plugin.kernels.update_affine`: plain PyTorch on flat vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["update_affine"]


def update_affine(
    weights: Tensor,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float = 1.0,
    total: Tensor | None = None,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_affine`; ``weights`` [N] is a plain vector here."""
    weights = weights.to(mean.dtype)
    limit = 2.0**-20 * torch.finfo(mean.dtype).max
    if not bool(weights.double().square().sum() <= limit):  # the snapshot is not taken in
        return torch.full((), float("nan"), dtype=torch.float64, device=mean.device)
    innovation = weights - mean
    squares = innovation.double().square().sum()
    mean += blend * innovation
    slope *= decay
    slope += gain.to(mean.dtype)[mode.long()] * innovation
    if total is not None:
        total *= decay
        total += (1 - blend) * innovation.square()
    return squares
