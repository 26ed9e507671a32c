"""Embeddings as the functions of this room take them: finite rows in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.clip._rows import Rows, row_blocks
from cmd_plugin.errors import InputError, NonFiniteError, ShapeError

__all__ = ["embeddings", "pairs", "same_width", "unit"]


def embeddings(x: Rows, name: str, least: int = 1) -> Tensor:
    """Return embeddings in float64, where they are (on the CPU if that device has no float64).

    Args:
        x: Shape [N, d], any real dtype; an array is copied.
        name: What the caller calls them, for messages.
        least: How many rows are needed.

    Raises:
        ShapeError: If it is no matrix of numbers with columns.
        InputError: If there are fewer rows.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    if not isinstance(x, Tensor):
        x = next(row_blocks(x, len(x))) if x.ndim and len(x) else torch.empty(x.shape)
    if x.ndim != 2 or x.shape[1] < 1 or x.is_complex() or x.dtype == torch.bool:
        raise ShapeError(
            f"{name} must be embeddings [N, d], one a row, got {x.dtype} {tuple(x.shape)}."
        )
    if len(x) < least:
        raise InputError(f"{name} has {len(x)} rows and at least {least} are needed: give more.")
    wide = x.detach()
    wide = (wide.cpu() if wide.device.type == "mps" else wide).double()
    bad = int((~wide.isfinite().all(dim=1)).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {len(x)} rows of {name} hold NaN or infinite values: drop them first."
        )
    return wide


def unit(x: Tensor, name: str) -> Tensor:
    """Return rows [N, d] divided by their L2 norms.

    Raises:
        InputError: If a row is zero, which has no direction.
    """
    norms = x.norm(dim=1, keepdim=True)
    zero = int((norms == 0).sum())
    if zero:
        raise InputError(f"{zero} of {len(x)} rows of {name} are zero: drop them first.")
    units: Tensor = x / norms
    return units


def same_width(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Raise ShapeError unless both have the same number of columns."""
    if x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"{names[0]} has {x.shape[1]} columns and {names[1]} {y.shape[1]}: give embeddings "
            "of one model."
        )


def pairs(images: Rows, texts: Rows, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return image and text embeddings of which rows i belong together, in float64.

    Raises:
        ShapeError: If the shapes differ, or are not [N, d].
        InputError: If there are fewer rows.
        NonFiniteError: If a row holds NaN or infinite values.
    """
    left, right = embeddings(images, "images", least), embeddings(texts, "texts", least)
    if left.shape != right.shape:
        raise ShapeError(
            f"images {tuple(left.shape)} and texts {tuple(right.shape)} must be pairs, row by row."
        )
    return left, right
