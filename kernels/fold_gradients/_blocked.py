"""Cache-blocked PyTorch path of ``fold_gradients``."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import BLOCK

__all__ = ["fold_gradients"]


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    """See :func:`cmd_plugin.kernels.fold_gradients`."""
    sums = torch.zeros(modes, dtype=torch.float64, device=gradient.device)
    for start in range(0, len(gradient), BLOCK):
        block = slice(start, min(len(gradient), start + BLOCK))
        part = torch.where(embedded[block], gradient[block], 0.0).double() * scale[block].double()
        if gradient.device.type == "cpu":
            sums += torch.bincount(mode[block], part, modes)
        else:  # bincount on a GPU adds in any order
            for m in range(modes):
                sums[m] += torch.where(mode[block] == m, part, 0.0).sum()
        gradient[block].masked_fill_(embedded[block], 0.0)
    return sums
