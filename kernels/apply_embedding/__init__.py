"""Overwrite the embedded weights by what their modes say, and touch no other."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_state
from cmd_plugin.kernels.apply_embedding import _blocked
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["apply_embedding"]


def apply_embedding(
    weights: FlatView,
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    offset: Tensor,
    profile: Tensor,
) -> None:
    r"""Write :math:`w_i = a_i r_{m(i)} + b_i` into the embedded weights, in place.

    All other weights keep their bits, whatever dtype they have. The product is rounded before the
    sum is taken, so that the result is the same on every machine.

    Args:
        weights: The N weights.
        embedded: [N] bool, which ones to overwrite.
        mode: [N] uint8.
        scale: [N] of the view's dtype, :math:`a`.
        offset: [N] of the view's dtype, :math:`b`.
        profile: [M] current value :math:`r` of every mode's profile, on any device.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
    """
    arrays: dict[str, Tensor | None] = {"scale": scale, "offset": offset}
    require_state(weights.numel, weights.dtype, mode, arrays, {"profile": profile})
    if embedded.shape != mode.shape or embedded.dtype != torch.bool:
        raise ShapeError(
            f"embedded must be [{weights.numel}] bool, got {tuple(embedded.shape)} "
            f"{embedded.dtype}."
        )
    _blocked.apply_embedding(weights, embedded, mode, scale, offset, profile)
