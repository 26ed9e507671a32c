"""Triton path of ``apply_embedding``: one launch over all tensors.

Of a block without an embedded weight only the flags are read. In others everything is read and
written whole: masked by the flags, each value would be an access of its own.
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
    chosen = tl.load(embedded + at, ok, 0) != 0
    if tl.max(chosen.to(tl.int32)) > 0:
        # A weight that is not embedded may have any number as its mode.
        m = tl.where(chosen, tl.load(mode + at, ok, 0), 0).to(tl.int32)
        w = tl.load(weights + where, ok, 0.0)
        model = tl.load(scale + at, ok, 0.0) * tl.load(profile + m)
        model += tl.load(offset + at, ok, 0.0)
        model = rounded(model, weights.dtype.element_ty)
        tl.store(weights + where, tl.where(chosen, model, w), ok)


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
