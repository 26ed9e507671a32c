"""Cache-blocked PyTorch path of ``update_affine``: 13 bytes read and 8 written per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.mode_table import ModeTable

__all__ = ["update_affine"]


def update_affine(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
) -> float:
    """See :func:`cmd_plugin.kernels.update_affine`."""
    table = ModeTable(gain.to(mean.device, mean.dtype), weights.block)
    values, innovation, gains = weights.scratch(), weights.scratch(), weights.scratch()
    squares = torch.zeros((), dtype=torch.float64, device=mean.device)
    for number, start, stop in weights.blocks():
        block = slice(start, stop)
        difference = innovation[: stop - start]
        torch.sub(weights.read(number, values), mean[block], out=difference)
        mean[block].add_(difference, alpha=blend)
        if decay != 1.0:
            slope[block].mul_(decay)
        factor = table.lookup(mode[block], gains[: stop - start])
        slope[block].addcmul_(difference, factor)
        squares += torch.dot(difference, difference)
        if total is not None:
            total[block].mul_(decay).addcmul_(difference, difference, value=1.0 - blend)
    return float(squares)
