"""Triton path of ``mahalanobis``: the rows are read, N numbers are written, nothing in between.

A program takes a block of rows. Tile by tile of columns it multiplies the centred rows down to the
last row of the tile that is not zero, squares what it has, and adds it to a sum for each row that
stays in registers. Rows are centred in registers, in float32, whatever they are stored in; the
matrix comes from the cache. Products are float32's, three passes of tensor cores each.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mahalanobis"]

_ROWS, _COLUMNS, _DEPTH = 64, 64, 16  # deeper tiles spill registers on capability 80


@triton.jit
def _distances(
    x,
    mean,
    matrix,
    result,
    count,
    dim,
    columns,
    row_stride,
    feature_stride,
    TRIANGULAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < count
    x += row[:, None] * row_stride
    total = tl.zeros((ROWS,), tl.float32)
    for left in range(0, columns, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        below = dim
        if TRIANGULAR:
            below = min(left + COLUMNS + dim - columns, dim)
        for top in range(0, below, DEPTH):
            feature = top + tl.arange(0, DEPTH)
            there = feature < dim
            value = tl.load(
                x + feature[None, :].to(tl.int64) * feature_stride,
                real[:, None] & there[None, :],
                0.0,
            ).to(tl.float32)
            value -= tl.load(mean + feature, there, 0.0)[None, :]
            factor = tl.load(
                matrix + feature[:, None] * columns + column[None, :],
                there[:, None] & (column < columns)[None, :],
                0.0,
            )
            part = tl.dot(value, factor, part, input_precision="tf32x3")
        total += tl.sum(part * part, axis=1)
    tl.store(result + row, total, real)


def mahalanobis(x: Tensor, mean: Tensor, matrix: Tensor, triangular: bool) -> Tensor:
    """See :func:`cmd_plugin.kernels.mahalanobis`; ``mean`` and ``matrix`` are float32."""
    count, dim = x.shape
    result = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            _distances[(triton.cdiv(count, _ROWS),)](
                x,
                mean.contiguous(),
                matrix,
                result,
                count,
                dim,
                matrix.shape[1],
                *x.stride(),
                TRIANGULAR=triangular,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                DEPTH=_DEPTH,
                num_warps=8,
                num_stages=2,
            )
    return result
