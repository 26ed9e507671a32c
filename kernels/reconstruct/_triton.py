"""Triton path of ``reconstruct``: one launch over all tensors, 9 bytes read, 4 written a weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import aligned, find_block, launch_blocks, pack, rounded, strided
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["load_block", "model_block", "reconstruct"]


@triton.jit
def model_block(m, s, b, v, step, energy):
    """Return the modelled values of weights in modes ``m`` with slopes ``s`` and means ``b``."""
    moved = tl.load(step + m)
    if energy is not None:
        share = tl.load(energy + m) * s * s / v
        share = tl.where(share > 1.0, 1.0, share)
        moved *= tl.where(share > 0.0, share, 0.0)  # NaN too: 0 / 0 of a weight that never moved
    return b + moved * s


@triton.jit
def load_block(at, ok, mode, slope, mean, total, step, energy):
    m = tl.load(mode + at, ok, 0).to(tl.int32)
    s = tl.load(slope + at, ok, 0.0)
    b = tl.load(mean + at, ok, 0.0)
    v = b
    if total is not None:
        v = tl.load(total + at, ok, 1.0)
    return model_block(m, s, b, v, step, energy)


@triton.jit
def _fill(
    records,
    shapes,
    mode,
    slope,
    mean,
    total,
    step,
    energy,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer, inside, start, count, kind = find_block(records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind == 1:
        pointer, inside, start = aligned(pointer, inside, start)
        ok = lane < BLOCK
        value = load_block(start + lane, ok, mode, slope, mean, total, step, energy)
        tl.store(pointer + inside + lane, rounded(value, WEIGHT), ok)
    else:
        where = strided(shapes, kind, inside + lane)
        ok = lane < count
        value = load_block(start + lane, ok, mode, slope, mean, total, step, energy)
        tl.store(pointer + where, rounded(value, WEIGHT), ok)


def reconstruct(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
) -> None:
    """See :func:`cmd_plugin.kernels.reconstruct_into`."""
    tables = pack(mean, step, *([] if energy is None else [energy]))
    steps, energies = tables[: len(step)], None if energy is None else tables[len(step) :]
    for blocks in weights.pointer_table().launches:
        # Products are rounded before they are added, as PyTorch does: the same bits everywhere.
        launch_blocks(
            _fill,
            blocks,
            blocks.shapes,
            mode,
            slope,
            mean,
            total,
            steps,
            energies,
            enable_fp_fusion=False,
        )
