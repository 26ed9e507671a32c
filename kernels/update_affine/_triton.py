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
from cmd_plugin.kernels.pointer_table import PointerTable

__all__ = ["launch_updates", "update_affine"]

TABLE: tl.constexpr = tl.constexpr(3)  # numbers in front of the table of gains


@triton.jit
def update_block(weights, where, at, ok, mode, slope, mean, total, constants, factors):
    """Update the weights at flat positions ``at``; return their e^2.

    ``factors`` are what slopes are multiplied by first, a value a mode after a number that says
    whether there is anything to do; or None.
    """
    blend = tl.load(constants)
    decay = tl.load(constants + 1)
    rest = tl.load(constants + 2)  # 1 - blend, rounded once
    m = tl.load(mode + at, ok, 0).to(tl.int32)
    b = tl.load(mean + at, ok, 0.0)
    w = tl.load(weights + where, ok, 0.0).to(b.dtype)
    e = w - b
    square = e * e
    b += e * blend
    s = tl.load(slope + at, ok, 0.0)
    if factors is not None:  # noqa: SIM102 which is decided when it is compiled
        if tl.load(factors) != 0.0:
            s = (s * tl.load(factors + 1 + m)).to(b.dtype)
    s = s * decay + e * tl.load(constants + TABLE + m)
    tl.store(mean + at, b, ok)
    tl.store(slope + at, s, ok)
    if total is not None:
        v = tl.load(total + at, ok, 0.0) * decay + e * e * rest
        tl.store(total + at, v, ok)
    return square


@triton.jit
def _update(
    records,
    shapes,
    mode,
    slope,
    mean,
    total,
    constants,
    factors,
    accepted,
    squares,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    taken = True
    if accepted is not None:  # where nobody waited for the answer, the device has it
        taken = tl.load(accepted) != 0.0
    if taken:
        pointer, inside, start, count, kind = find_block(records, WEIGHT)
        lane = tl.arange(0, BLOCK)
        if kind == 1:
            pointer, inside, start = aligned(pointer, inside, start)
            where, ok = inside + lane, lane < BLOCK
            at = start + lane
            squared = update_block(
                pointer, where, at, ok, mode, slope, mean, total, constants, factors
            )
            tl.store(squares + tl.program_id(0), tl.sum(squared).to(tl.float64))
        else:
            where, ok = strided(shapes, kind, inside + lane), lane < count
            at = start + lane
            squared = update_block(
                pointer, where, at, ok, mode, slope, mean, total, constants, factors
            )
            tl.store(squares + tl.program_id(0), tl.sum(squared).to(tl.float64))


def launch_updates(
    table: PointerTable,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    total: Tensor | None,
    constants: Tensor,
    squares: Tensor,
    factors: Tensor | None = None,
    accepted: Tensor | None = None,
) -> None:
    """Update all weights; ``squares`` [P] float64 gets the sum of e^2 of each block.

    Args:
        table: Where the weights are.
        mode: [N] uint8.
        slope: [N], changed in place.
        mean: [N], changed in place.
        total: [N], changed in place, or None.
        constants: [3 + M] blend, decay, 1 - blend and the gains, in the dtype of ``mean``.
        squares: [P] float64, one number a block.
        factors: [1 + M] float64, see :func:`update_block`.
        accepted: [1] float64; nothing is done where it is zero.
    """
    done = 0
    for blocks in table.launches:
        part = squares[done : done + blocks.programs]
        launch_blocks(
            *(_update, blocks, blocks.shapes, mode, slope, mean, total, constants),
            *(factors, accepted, part),
        )
        done += blocks.programs


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
    launch_updates(table, mode, slope, mean, total, constants, squares)
    return squares.sum()
