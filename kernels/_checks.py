"""What the kernels ask of the state vectors they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import ShapeError

__all__ = ["require_state"]


def require_state(
    numel: int,
    dtype: torch.dtype,
    mode: Tensor,
    arrays: dict[str, Tensor | None],
    tables: dict[str, Tensor | None],
) -> None:
    """Raise ShapeError unless all arguments fit N weights.

    Args:
        numel: Number of weights N.
        dtype: Dtype the arrays must have.
        mode: Must be [N] uint8.
        arrays: Must be [N] of ``dtype``, by name.
        tables: Must be one value per mode, [M], M in 1..256, by name.
    """
    if mode.shape != (numel,) or mode.dtype != torch.uint8:
        raise ShapeError(f"mode must be [{numel}] uint8, got {tuple(mode.shape)} {mode.dtype}.")
    for name, array in arrays.items():
        if array is not None and (array.shape != (numel,) or array.dtype != dtype):
            raise ShapeError(
                f"{name} must be [{numel}] {dtype}, got {tuple(array.shape)} {array.dtype}."
            )
    for name, table in tables.items():
        if table is not None and (table.ndim != 1 or not 1 <= len(table) <= 256):
            raise ShapeError(f"{name} must be [M], M in 1..256, got {tuple(table.shape)}.")
