"""The specification of :func:`swap_in` and :func:`swap_out`: plain PyTorch on flat vectors."""

from __future__ import annotations

from torch import Tensor

from cmd_plugin.kernels.reconstruct.reference import reconstruct

__all__ = ["swap_in", "swap_out"]


def swap_in(
    weights: Tensor,
    backup: Tensor,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None = None,
    energy: Tensor | None = None,
) -> None:
    """Fill ``backup`` [N] with ``weights`` [N], and these with the modelled weights."""
    backup.copy_(weights)
    weights.copy_(reconstruct(mode, slope, mean, step, total, energy))


def swap_out(weights: Tensor, backup: Tensor) -> None:
    """Fill ``weights`` [N] with ``backup`` [N]."""
    weights.copy_(backup)
