"""The specification of :func:`cmd_plugin.kernels.apply_embedding`: plain PyTorch on a vector."""

from __future__ import annotations

from torch import Tensor

__all__ = ["apply_embedding"]


def apply_embedding(
    weights: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, offset: Tensor, profile: Tensor
) -> None:
    """See :func:`cmd_plugin.kernels.apply_embedding`; ``weights`` [N] is a plain vector here."""
    model = scale * profile.to(scale.dtype)[mode.long()] + offset
    weights[embedded] = model[embedded].to(weights.dtype)
