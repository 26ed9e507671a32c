"""Triton path of ``update_and_reconstruct``: one launch, 13 bytes read, 12 written a weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import aligned, find_block, launch_blocks, pack, strided
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.reconstruct._triton import model_block
from cmd_plugin.kernels.update_affine._triton import update_block

__all__ = ["update_and_reconstruct"]


@triton.jit
def _both(
    records,
    shapes,
    mode,
    slope,
    mean,
    total,
    constants,
    step,
    energy,
    out,
    squares,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer, inside, start, count, kind = find_block(records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind == 1:
        pointer, inside, start = aligned(pointer, inside, start)
        at = start + lane
        ok = lane < BLOCK
        m, s, b, v, squared = update_block(
            pointer, inside + lane, at, ok, mode, slope, mean, total, constants
        )
        tl.store(out + at, model_block(m, s, b, v, step, energy), ok)
        tl.store(squares + tl.program_id(0), tl.sum(squared).to(tl.float64))
    else:
        where = strided(shapes, kind, inside + lane)
        at = start + lane
        ok = lane < count
        m, s, b, v, squared = update_block(
            pointer, where, at, ok, mode, slope, mean, total, constants
        )
        tl.store(out + at, model_block(m, s, b, v, step, energy), ok)
        tl.store(squares + tl.program_id(0), tl.sum(squared).to(tl.float64))


def update_and_reconstruct(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    step: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
    energy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_and_reconstruct`."""
    modes = len(gain)
    constants = pack(mean, blend, decay, 1.0 - blend, gain)
    tables = pack(mean, step, *([] if energy is None else [energy]))
    energies = None if energy is None else tables[modes:]
    table = weights.pointer_table()
    squares = torch.empty(table.programs, dtype=torch.float64, device=mean.device)
    done = 0
    for blocks in table.launches:
        launch_blocks(
            _both,
            blocks,
            blocks.shapes,
            mode,
            slope,
            mean,
            total,
            constants,
            tables[:modes],
            energies,
            out,
            squares[done : done + blocks.programs],
        )
        done += blocks.programs
    return squares.sum()
