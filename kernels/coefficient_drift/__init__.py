"""How far every weight's coefficients have moved since the last embedding event."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels.coefficient_drift import _blocked

__all__ = ["coefficient_drift"]


def coefficient_drift(
    scale: Tensor,
    offset: Tensor,
    old_scale: Tensor,
    old_offset: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`\sqrt{(a_i - a_i^{old})^2 + (b_i - b_i^{old})^2}` of every weight.

    Args:
        scale: [N] float32 or float64, :math:`a`.
        offset: [N] of the same dtype, :math:`b`.
        old_scale: [N] of the same dtype.
        old_offset: [N] of the same dtype.
        out: [N] of the same dtype, filled and returned when given; it may be one of the arguments.

    Raises:
        ShapeError: If shapes, dtypes or devices differ.
    """
    arrays = {"offset": offset, "old_scale": old_scale, "old_offset": old_offset, "out": out}
    if scale.ndim != 1 or scale.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"scale must be [N] float32 or float64, got {tuple(scale.shape)} {scale.dtype}."
        )
    for name, array in arrays.items():
        if array is not None and (
            array.shape != scale.shape or array.dtype != scale.dtype or array.device != scale.device
        ):
            raise ShapeError(
                f"{name} must be {tuple(scale.shape)} {scale.dtype} on {scale.device}, got "
                f"{tuple(array.shape)} {array.dtype} on {array.device}."
            )
    if out is None:
        out = torch.empty_like(scale)
    _blocked.coefficient_drift(scale, offset, old_scale, old_offset, out)
    return out
