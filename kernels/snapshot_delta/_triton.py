"""Triton path of ``snapshot_delta``: one launch over all tensors, 8 bytes read, 2 written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import aligned, find_block, launch_blocks, rounded, strided
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["snapshot_delta"]


@triton.jit
def _subtract_block(weights, where, at, ok, base, out):
    w = tl.load(weights + where, ok, 0.0)
    if base is not None:
        b = tl.load(base + at, ok, 0.0)
        tl.store(out + at, rounded(w.to(b.dtype) - b, out.dtype.element_ty), ok)
    else:
        tl.store(out + at, rounded(w, out.dtype.element_ty), ok)


@triton.jit
def _subtract(records, shapes, base, out, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    pointer, inside, start, count, kind = find_block(records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind == 1:
        pointer, inside, start = aligned(pointer, inside, start)
        _subtract_block(pointer, inside + lane, start + lane, lane < BLOCK, base, out)
    else:
        where = strided(shapes, kind, inside + lane)
        _subtract_block(pointer, where, start + lane, lane < count, base, out)


def snapshot_delta(weights: FlatView, base: Tensor | None, out: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.snapshot_delta`."""
    for blocks in weights.pointer_table().launches:
        launch_blocks(_subtract, blocks, blocks.shapes, base, out)
