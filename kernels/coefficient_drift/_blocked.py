"""Cache-blocked PyTorch path of ``coefficient_drift``: 16 bytes read and 4 written per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.kernels.flat_view import BLOCK

__all__ = ["coefficient_drift"]


def coefficient_drift(
    scale: Tensor, offset: Tensor, old_scale: Tensor, old_offset: Tensor, out: Tensor
) -> None:
    """See :func:`cmd_plugin.kernels.coefficient_drift`; fills ``out``."""
    scratch = torch.empty(min(BLOCK, len(scale)), dtype=scale.dtype, device=scale.device)
    for start in range(0, len(scale), BLOCK):
        block = slice(start, min(len(scale), start + BLOCK))
        other = torch.sub(offset[block], old_offset[block], out=scratch[: block.stop - block.start])
        other.mul_(other)
        result = torch.sub(scale[block], old_scale[block], out=out[block])
        result.mul_(result).add_(other).sqrt_()
