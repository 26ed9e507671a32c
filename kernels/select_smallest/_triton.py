"""Triton path of ``select_smallest``: three passes that count digits, two for ties and marks.

A program counts digits of its share in registers and writes 2048 counters once: no atomics on the
few bins that neighbouring values fall into. Boundary and count stay on the device; the only wait is
for the number of NaN at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels._triton import launch
from cmd_plugin.kernels.pointer_table import BLOCK as _BLOCK

__all__ = ["select_smallest"]

_DIGIT = 11
_PROGRAMS = 1024


@triton.jit
def _keys(values, at, ok):
    """Return (unsigned keys in the order of the values, whether they are NaN)."""
    x = tl.load(values + at, ok, 0.0)
    if x.dtype == tl.float64:
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int64, bitcast=True)  # -0.0 equals 0.0
        turned = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        return turned ^ (-0x7FFFFFFFFFFFFFFF - 1), x != x
    single = x.to(tl.float32)
    bits = tl.where(single == 0.0, 0.0, single).to(tl.int32, bitcast=True)
    turned = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return turned.to(tl.int64) + 0x80000000, single != single


@triton.jit
def _count(
    values,
    prefix,
    counts,
    bad,
    numel,
    blocks,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([2048], dtype=tl.int32)
    nans = tl.zeros([BLOCK], dtype=tl.int32)
    skipped = 0
    above = tl.load(prefix)
    block = program
    while block < blocks:
        at = block * BLOCK + tl.arange(0, BLOCK)
        ok = at < numel
        keys, nan = _keys(values, at, ok)
        inside = ok
        if FIRST:
            nans += (ok & nan).to(tl.int32)
        else:
            # The mask makes the shift of a negative number one of its bits.
            upper = (keys >> (SHIFT + BITS)) & ((1 << (64 - SHIFT - BITS)) - 1)
            inside = ok & (upper == above)
        digit = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        total += tl.histogram(tl.where(inside, digit, 0), 2048)
        skipped += tl.sum((~inside).to(tl.int32))  # they were counted in bin 0
        block += tl.num_programs(0)
    bins = tl.arange(0, 2048)
    total -= tl.where(bins == 0, skipped, 0)
    tl.store(counts + program * 2048 + bins, total)
    if FIRST:
        tl.store(bad + program, tl.sum(nans))


@triton.jit
def _ties(values, boundary, equal, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numel
    keys, _ = _keys(values, at, ok)
    tl.store(equal + tl.program_id(0), tl.sum((ok & (keys == tl.load(boundary))).to(tl.int32)))


@triton.jit
def _mark(values, boundary, wanted, before, chosen, numel, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numel
    keys, _ = _keys(values, at, ok)
    edge = tl.load(boundary)
    tie = ok & (keys == edge)
    rank = tl.load(before + tl.program_id(0)) + tl.cumsum(tie.to(tl.int32), 0)
    # As signed numbers the keys of float64 are in order once their top bit is turned.
    below = (keys ^ FLIP) < (edge ^ FLIP)
    tl.store(chosen + at, (below | (tie & (rank <= tl.load(wanted)))).to(tl.uint8), ok)


def select_smallest(values: Tensor, num: int, chosen: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.select_smallest`; marks in ``chosen``, 1 <= num <= N."""
    width = 64 if values.dtype == torch.float64 else 32
    device, numel = values.device, len(values)
    blocks = -(-numel // _BLOCK)
    programs = min(_PROGRAMS, blocks)
    counts = torch.empty(programs, 2048, dtype=torch.int32, device=device)
    bad = torch.empty(programs, dtype=torch.int32, device=device)
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    wanted = torch.full((1,), num, dtype=torch.int64, device=device)
    shift = width
    while shift:
        bits = min(_DIGIT, shift)
        first, shift = shift == width, shift - bits
        launch(
            _count,
            programs,
            device,
            values,
            prefix,
            counts,
            bad,
            numel,
            blocks,
            SHIFT=shift,
            BITS=bits,
            FIRST=first,
            BLOCK=_BLOCK,
        )
        reached = counts.sum(dim=0, dtype=torch.int64).cumsum(0)
        found = torch.searchsorted(reached, wanted)
        wanted -= torch.where(found > 0, reached[(found - 1).clamp(min=0)], 0)
        prefix = (prefix << bits) | found
    equal = torch.empty(blocks, dtype=torch.int32, device=device)
    launch(_ties, blocks, device, values, prefix, equal, numel, BLOCK=_BLOCK)
    before = equal.cumsum(0, dtype=torch.int64) - equal
    flip = -(1 << 63) if width == 64 else 0
    marks = chosen.view(torch.uint8)
    launch(
        _mark,
        blocks,
        device,
        values,
        prefix,
        wanted,
        before,
        marks,
        numel,
        FLIP=flip,
        BLOCK=_BLOCK,
    )
    if bool(bad.any()):
        raise InputError("a value is NaN, which is neither small nor large.")
