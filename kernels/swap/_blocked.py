"""PyTorch path of ``swap_in`` and ``swap_out``: copies of tensors, and the blocked model."""

from __future__ import annotations

import torch

from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.reconstruct._blocked import reconstruct

__all__ = ["copy", "reconstruct"]


def copy(source: FlatView, target: FlatView) -> None:
    """Copy all tensors of one view into those of another, bit for bit."""
    torch._foreach_copy_(target.tensors, source.tensors)
