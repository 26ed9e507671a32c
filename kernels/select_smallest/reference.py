"""The specification of :func:`cmd_plugin.kernels.select_smallest`: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["select_smallest"]


def select_smallest(values: Tensor, num: int) -> Tensor:
    """Return [N] bool; see :func:`cmd_plugin.kernels.select_smallest`."""
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[values.argsort(stable=True)[:num]] = True
    return chosen
