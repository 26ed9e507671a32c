"""The chain rule of embedded weights: hand their gradients to their modes' profiles."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels._checks import require_state
from cmd_plugin.kernels.fold_gradients import _blocked

__all__ = ["fold_gradients"]


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    r"""Sum the gradients of embedded weights by mode, and zero them, in place.

    For :math:`w_i = a_i r_{m(i)} + b_i` the chain rule gives

    .. math:: G_m = \sum_{i \in E, m(i) = m} a_i\, g_i

    as what the embedded weights add to the gradient of :math:`r_m`. The sums are taken in float64
    and always in the same order, so that processes with equal gradients keep equal weights.

    Args:
        gradient: [N] floating, changed in place: zero where embedded.
        embedded: [N] bool.
        mode: [N] uint8.
        scale: [N] float32 or float64, :math:`a`.
        modes: Number of modes M.

    Returns:
        [M] float64, :math:`G`.

    Raises:
        ShapeError: If shapes or dtypes do not fit.
    """
    if gradient.ndim != 1 or not gradient.is_floating_point():
        raise ShapeError(
            f"gradient must be a floating vector [N], got {tuple(gradient.shape)} {gradient.dtype}."
        )
    require_state(len(gradient), scale.dtype, mode, {"scale": scale}, {})
    if embedded.shape != mode.shape or embedded.dtype != torch.bool:
        raise ShapeError(
            f"embedded must be [{len(gradient)}] bool, got {tuple(embedded.shape)} "
            f"{embedded.dtype}."
        )
    return _blocked.fold_gradients(gradient, embedded, mode, scale, modes)
