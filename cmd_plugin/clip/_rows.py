"""Rows of features, a block at a time, from a tensor, an array or an array on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmd_plugin.errors import ShapeError

__all__ = ["Rows", "check_rows", "row_blocks"]

Rows = Tensor | NDArray[Any]
"""Features [N, d], floating point; a ``numpy.memmap`` is read a block at a time."""


def check_rows(x: Rows, dim: int | None = None) -> None:
    """Raise ShapeError unless ``x`` is floating point [N, d].

    Args:
        x: Features.
        dim: What d must be; None means anything.
    """
    floating = (
        x.is_floating_point() if isinstance(x, Tensor) else np.issubdtype(x.dtype, np.floating)
    )
    if x.ndim != 2 or not floating or x.shape[1] == 0 or dim not in (None, x.shape[1]):
        raise ShapeError(
            f"features must be floating [N, {'d' if dim is None else dim}], got "
            f"{tuple(x.shape)} {x.dtype}."
        )


def row_blocks(x: Rows, size: int) -> Iterator[Tensor]:
    """Yield ``x`` in blocks of at most ``size`` rows, detached; arrays are copied a block each."""
    for start in range(0, len(x), size):
        block = x[start : start + size]
        if isinstance(block, Tensor):
            yield block.detach()
        else:  # a copy also brings an array on disk, or of the other byte order, into memory
            yield torch.from_numpy(np.array(block, dtype=block.dtype.newbyteorder("=")))
