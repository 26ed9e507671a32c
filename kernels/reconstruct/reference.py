"""The specification of :func:`cmd_plugin.kernels.reconstruct`: plain PyTorch on flat vectors."""

from __future__ import annotations

from torch import Tensor

__all__ = ["reconstruct"]


def reconstruct(
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None = None,
    energy: Tensor | None = None,
) -> Tensor:
    """Return [N] modelled weights; see :func:`cmd_plugin.kernels.reconstruct` for the arguments."""
    index = mode.long()
    moved = slope * step.to(slope.dtype)[index]
    if total is not None and energy is not None:
        explained = slope.square() * energy.to(slope.dtype)[index]
        moved = moved * (explained / total).nan_to_num(0.0).clamp(0.0, 1.0)
    return mean + moved
