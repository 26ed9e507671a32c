"""The specification of :func:`cmd_plugin.kernels.coefficient_drift`: plain PyTorch."""

from __future__ import annotations

from torch import Tensor

__all__ = ["coefficient_drift"]


def coefficient_drift(
    scale: Tensor, offset: Tensor, old_scale: Tensor, old_offset: Tensor
) -> Tensor:
    """Return [N]; see :func:`cmd_plugin.kernels.coefficient_drift`."""
    return ((scale - old_scale).square() + (offset - old_offset).square()).sqrt()
