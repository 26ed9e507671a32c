"""Triton path of ``reconstruct``: one launch over all tensors, 9 bytes read, 4 written a weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import (
    aligned,
    find_block,
    launch_blocks,
    launch_vector,
    pack,
    rounded,
    strided,
    vector_block,
)
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.pointer_table import BLOCK

__all__ = ["load_block", "model_block", "reconstruct", "reconstruct_vector", "tables_of"]


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


@triton.jit
def _fill_vector(
    out,
    mode,
    slope,
    mean,
    total,
    step,
    energy,
    first,
    numel,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, ok = vector_block(first, numel, WHOLE, BLOCK)
    value = load_block(at, ok, mode, slope, mean, total, step, energy)
    tl.store(out + at, value, ok)


def tables_of(mean: Tensor, step: Tensor, energy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``step`` and ``energy`` as the kernels read them, by one copy to the device."""
    if energy is None:
        return pack(mean, step), None
    both = pack(mean, step, energy)
    return both[: len(step)], both[len(step) :]


def reconstruct_vector(
    out: Tensor,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
) -> None:
    """See :func:`cmd_plugin.kernels.reconstruct`: one contiguous vector needs no table."""
    arguments = (out, mode, slope, mean, total, *tables_of(mean, step, energy))
    launch_vector(_fill_vector, len(out), BLOCK, out.device, *arguments, enable_fp_fusion=False)


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
    steps, energies = tables_of(mean, step, energy)
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
