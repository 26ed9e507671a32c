"""What the kernels ask of the state vectors and clouds they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import NonFiniteError, ShapeError
from cmd_plugin.kernels.flat_view import FlatView

__all__ = [
    "require_backup",
    "require_clouds",
    "require_pair",
    "require_state",
    "require_vector",
]


def require_state(
    numel: int,
    dtype: torch.dtype,
    mode: Tensor,
    arrays: dict[str, Tensor | None],
    tables: dict[str, Tensor | None],
    device: torch.device | None = None,
) -> None:
    """Raise ShapeError unless all arguments fit N weights.

    Args:
        numel: Number of weights N.
        dtype: Dtype the arrays must have.
        mode: Must be [N] uint8.
        arrays: Must be [N] of ``dtype``, by name.
        tables: Must be one value per mode, [M], M in 1..256, by name; on any device.
        device: Where mode and arrays must be; None means where ``mode`` is.
    """
    if mode.shape != (numel,) or mode.dtype != torch.uint8:
        raise ShapeError(f"mode must be [{numel}] uint8, got {tuple(mode.shape)} {mode.dtype}.")
    if not mode.is_contiguous():
        raise ShapeError(f"mode must be contiguous, got strides {mode.stride()}.")
    place = mode.device if device is None else device
    if mode.device != place:
        raise ShapeError(f"mode must be on {place}, where the weights are, not on {mode.device}.")
    for name, array in arrays.items():
        require_vector(name, array, numel, dtype, place)
    for name, table in tables.items():
        if table is not None and (table.ndim != 1 or not 1 <= len(table) <= 256):
            raise ShapeError(f"{name} must be [M], M in 1..256, got {tuple(table.shape)}.")


def require_vector(
    name: str, array: Tensor | None, numel: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ShapeError unless an array, if there is one, is contiguous [N] here."""
    if array is None:
        return
    if array.shape != (numel,) or array.dtype != dtype:
        raise ShapeError(
            f"{name} must be [{numel}] {dtype}, got {tuple(array.shape)} {array.dtype}."
        )
    if not array.is_contiguous():
        raise ShapeError(f"{name} must be contiguous, got strides {array.stride()}.")
    if array.device != device:
        raise ShapeError(f"{name} must be on {device}, where the weights are, not {array.device}.")


def require_pair(total: Tensor | None, energy: Tensor | None) -> None:
    """Raise ShapeError if only one of the two arguments that shrink is given."""
    if (total is None) != (energy is None):
        raise ShapeError("total and energy are given together or not at all.")


def require_backup(weights: FlatView, backup: FlatView) -> None:
    """Raise ShapeError unless a backup has the weights' shapes, dtypes and device."""
    ours = [(t.shape, t.dtype, t.device) for t in weights.tensors]
    theirs = [(t.shape, t.dtype, t.device) for t in backup.tensors]
    if ours != theirs:
        raise ShapeError(
            "backup must have the weights' shapes, dtypes and device: make it with "
            "weights.empty_like()."
        )


def require_clouds(name: str, clouds: Tensor) -> None:
    """Raise unless ``clouds`` are [B, N, C] floating point with N, C >= 1, and finite.

    Raises:
        ShapeError: If shape or dtype do not fit.
        NonFiniteError: If a coordinate is NaN or infinite.
    """
    if clouds.ndim != 3 or not clouds.shape[1] or not clouds.shape[2]:
        raise ShapeError(f"{name} must be [B, N, C], got {tuple(clouds.shape)}.")
    if not clouds.is_floating_point():
        raise ShapeError(f"{name} must be floating point, got {clouds.dtype}.")
    finite = clouds.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NonFiniteError(f"{name} hold {bad} NaN or infinite coordinates: remove them first.")
