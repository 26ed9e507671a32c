"""Triton path of ``apply_embedding``: one launch over all tensors; sectors nobody is in are left.

Loads and stores are masked by the flags, so memory that holds no embedded weight is not read beyond
its flags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import aligned, find_block, launch_blocks, pack, rounded, strided
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["apply_embedding"]


@triton.jit
def _apply_block(weights, where, at, ok, embedded, mode, scale, offset, profile):
    chosen = ok & (tl.load(embedded + at, ok, 0) != 0)
    m = tl.load(mode + at, chosen, 0).to(tl.int32)
    model = tl.load(scale + at, chosen, 0.0) * tl.load(profile + m)
    model += tl.load(offset + at, chosen, 0.0)
    tl.store(weights + where, rounded(model, weights.dtype.element_ty), chosen)


@triton.jit
def _apply(
    records,
    shapes,
    embedded,
    mode,
    scale,
    offset,
    profile,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer, inside, start, count, kind = find_block(records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind == 1:
        pointer, inside, start = aligned(pointer, inside, start)
        where, at, ok = inside + lane, start + lane, lane < BLOCK
        _apply_block(pointer, where, at, ok, embedded, mode, scale, offset, profile)
    else:
        where = strided(shapes, kind, inside + lane)
        at, ok = start + lane, lane < count
        _apply_block(pointer, where, at, ok, embedded, mode, scale, offset, profile)


def apply_embedding(
    weights: FlatView,
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    offset: Tensor,
    profile: Tensor,
) -> None:
    """See :func:`cmd_plugin.kernels.apply_embedding`."""
    values, flags = pack(scale, profile), embedded.view(torch.uint8)
    for blocks in weights.pointer_table().launches:
        launch_blocks(
            _apply,
            blocks,
            blocks.shapes,
            flags,
            mode,
            scale,
            offset,
            values,
            enable_fp_fusion=False,
        )
