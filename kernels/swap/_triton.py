"""Triton path of ``swap_in`` and ``swap_out``: one launch over all tensors each."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import aligned, find_block, launch_blocks, rounded, strided
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.pointer_table import Launch
from cmd_plugin.kernels.reconstruct._triton import load_block, tables_of

__all__ = ["swap_in", "swap_out"]


@triton.jit
def _swap_in(
    records,
    shapes,
    backup_records,
    backup_shapes,
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
    kept, _, _, _, kept_kind = find_block(backup_records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind * kept_kind == 1:
        kept, _, _ = aligned(kept, inside, start)
        pointer, inside, start = aligned(pointer, inside, start)
        ok = lane < BLOCK
        at = inside + lane
        tl.store(kept + at, tl.load(pointer + at, ok, 0.0), ok)
        # The modelled value does not depend on the raw one, so the compiler may store it in another
        # layout: no warp may write before all have read.
        tl.debug_barrier()
        value = load_block(start + lane, ok, mode, slope, mean, total, step, energy)
        tl.store(pointer + at, rounded(value, WEIGHT), ok)
    else:
        where = strided(shapes, kind, inside + lane)
        ok = lane < count
        raw = tl.load(pointer + where, ok, 0.0)
        tl.store(kept + strided(backup_shapes, kept_kind, inside + lane), raw, ok)
        tl.debug_barrier()  # as above
        value = load_block(start + lane, ok, mode, slope, mean, total, step, energy)
        tl.store(pointer + where, rounded(value, WEIGHT), ok)


@triton.jit
def _swap_out(
    records,
    shapes,
    backup_records,
    backup_shapes,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer, inside, start, count, kind = find_block(records, WEIGHT)
    kept, _, _, _, kept_kind = find_block(backup_records, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind * kept_kind == 1:
        kept, _, _ = aligned(kept, inside, start)
        pointer, inside, _ = aligned(pointer, inside, start)
        ok = lane < BLOCK
        tl.store(pointer + inside + lane, tl.load(kept + inside + lane, ok, 0.0), ok)
    else:
        ok = lane < count
        raw = tl.load(kept + strided(backup_shapes, kept_kind, inside + lane), ok, 0.0)
        tl.store(pointer + strided(shapes, kind, inside + lane), raw, ok)


def _pairs(weights: FlatView, backup: FlatView) -> Iterator[tuple[Launch, Launch]]:
    tables = weights.pointer_table(backup), backup.pointer_table(weights)
    return zip(*(table.launches for table in tables), strict=True)


def swap_in(
    weights: FlatView,
    backup: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
) -> None:
    """See :func:`cmd_plugin.kernels.swap_in`."""
    steps, energies = tables_of(mean, step, energy)
    for blocks, kept in _pairs(weights, backup):
        launch_blocks(
            _swap_in,
            blocks,
            blocks.shapes,
            kept.records,
            kept.shapes,
            mode,
            slope,
            mean,
            total,
            steps,
            energies,
            enable_fp_fusion=False,
        )


def swap_out(weights: FlatView, backup: FlatView) -> None:
    """See :func:`cmd_plugin.kernels.swap_out`."""
    for blocks, kept in _pairs(weights, backup):
        launch_blocks(_swap_out, blocks, blocks.shapes, kept.records, kept.shapes)
