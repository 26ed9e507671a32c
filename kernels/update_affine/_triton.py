"""Triton path of ``update_affine``: one launch over all tensors, 13 bytes read, 8 written a weight.

Sums of squares are taken in float32 inside a block of 1024 weights and in float64 over blocks, in
the order of the blocks: the result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import aligned, find_block, launch_blocks, pack, strided
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["update_affine", "update_block"]

TABLE: tl.constexpr = tl.constexpr(3)  # numbers in front of the table of gains


@triton.jit
def update_block(weights, where, at, ok, mode, slope, mean, total, constants):
    """Update the weights at flat positions ``at``; return (mode, slope, mean, total, e^2)."""
    blend = tl.load(constants)
    decay = tl.load(constants + 1)
    rest = tl.load(constants + 2)  # 1 - blend, rounded once
    m = tl.load(mode + at, ok, 0).to(tl.int32)
    b = tl.load(mean + at, ok, 0.0)
    w = tl.load(weights + where, ok, 0.0).to(b.dtype)
    e = w - b
    square = e * e
    b += e * blend
    s = tl.load(slope + at, ok, 0.0) * decay + e * tl.load(constants + TABLE + m)
    tl.store(mean + at, b, ok)
    tl.store(slope + at, s, ok)
    v = b
    if total is not None:
        v = tl.load(total + at, ok, 0.0) * decay + e * e * rest
        tl.store(total + at, v, ok)
    return m, s, b, v, square


@triton.jit
def _update(
    records,
    shapes,
    mode,
    slope,
    mean,
    total,
    constants,
    squares,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer, inside, start, count, kind = find_block(records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind == 1:
        pointer, inside, start = aligned(pointer, inside, start)
        _, _, _, _, squared = update_block(
            pointer, inside + lane, start + lane, lane < BLOCK, mode, slope, mean, total, constants
        )
        tl.store(squares + tl.program_id(0), tl.sum(squared).to(tl.float64))
    else:
        where = strided(shapes, kind, inside + lane)
        _, _, _, _, squared = update_block(
            pointer, where, start + lane, lane < count, mode, slope, mean, total, constants
        )
        tl.store(squares + tl.program_id(0), tl.sum(squared).to(tl.float64))


def update_affine(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_affine`."""
    constants = pack(mean, blend, decay, 1.0 - blend, gain)
    table = weights.pointer_table()
    squares = torch.empty(table.programs, dtype=torch.float64, device=mean.device)
    done = 0
    for blocks in table.launches:
        part = squares[done : done + blocks.programs]
        launch_blocks(_update, blocks, blocks.shapes, mode, slope, mean, total, constants, part)
        done += blocks.programs
    return squares.sum()
