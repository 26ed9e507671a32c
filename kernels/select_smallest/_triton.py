"""Triton path of ``select_smallest``: a pass for each byte that counts it, two for ties and marks.

A program counts the bytes of its share in registers and writes 256 counters once: no atomics in
global memory on the few bins that neighbouring values fall into. (Digits of 11 bits would save a
pass, and 2048 counters a block cost more instructions than that.) Boundary and count stay on the
device; the only wait is for the number of NaN at the end.
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

_DIGIT = 8
_PROGRAMS = 1024
_SHARE = 4 * _BLOCK  # values between two additions to the counters


@triton.jit
def _turned(bits):
    """Turn the top bit: unsigned order of integers becomes signed order, and back."""
    if bits.dtype == tl.int64:  # noqa: SIM108 one of both is compiled
        turned = bits ^ (-0x7FFFFFFFFFFFFFFF - 1)
    else:
        turned = bits ^ (-0x7FFFFFFF - 1)
    return turned


@triton.jit
def _keys(values, at, ok):
    """Return (keys whose unsigned order is the values' order, whether the values are NaN)."""
    x = tl.load(values + at, ok, 0.0)
    if x.dtype == tl.float64:
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int64, bitcast=True)  # -0.0 equals 0.0
        ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        x = x.to(tl.float32)
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return _turned(ordered), x != x


@triton.jit
def _count(
    values,
    prefix,
    counts,
    numel,
    blocks,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    BINS: tl.constexpr = 1 << BITS
    total = tl.zeros([BINS], dtype=tl.int32)
    skipped = 0
    above = tl.load(prefix)
    block = program
    while block < blocks:
        at = block * BLOCK + tl.arange(0, BLOCK)
        ok = at < numel
        keys, _ = _keys(values, at, ok)
        inside = ok
        if not FIRST:
            # The mask makes the shift of a negative number one of its bits.
            upper = (keys >> (SHIFT + BITS)) & ((1 << (WIDTH - SHIFT - BITS)) - 1)
            inside = ok & (upper == above.to(keys.dtype))
        digit = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        total += tl.histogram(tl.where(inside, digit, 0), BINS)
        skipped += tl.sum((~inside).to(tl.int32))  # they were counted in bin 0
        block += tl.num_programs(0)
    bins = tl.arange(0, BINS)
    total -= tl.where(bins == 0, skipped, 0)
    tl.store(counts + program * BINS + bins, total)


@triton.jit
def _ties(values, boundary, equal, bad, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numel
    keys, nan = _keys(values, at, ok)
    tl.store(bad + tl.program_id(0), tl.sum((ok & nan).to(tl.int32)))
    tie = ok & (keys == tl.load(boundary).to(keys.dtype))
    tl.store(equal + tl.program_id(0), tl.sum(tie.to(tl.int32)))


@triton.jit
def _mark(values, boundary, wanted, before, chosen, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < numel
    keys, _ = _keys(values, at, ok)
    edge = tl.load(boundary).to(keys.dtype)
    tie = ok & (keys == edge)
    rank = tl.load(before + tl.program_id(0)) + tl.cumsum(tie.to(tl.int32), 0)
    below = _turned(keys) < _turned(edge)
    tl.store(chosen + at, (below | (tie & (rank <= tl.load(wanted)))).to(tl.uint8), ok)


def select_smallest(values: Tensor, num: int, chosen: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.select_smallest`; marks in ``chosen``, 1 <= num <= N."""
    width = 64 if values.dtype == torch.float64 else 32
    device, numel = values.device, len(values)
    shares = -(-numel // _SHARE)
    programs = min(_PROGRAMS, shares)
    counts = torch.empty(programs, 1 << _DIGIT, dtype=torch.int32, device=device)
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    wanted = torch.full((1,), num, dtype=torch.int64, device=device)
    shift = width
    while shift:
        first, shift = shift == width, shift - _DIGIT
        launch(
            _count,
            programs,
            device,
            values,
            prefix,
            counts,
            numel,
            shares,
            WIDTH=width,
            SHIFT=shift,
            BITS=_DIGIT,
            FIRST=first,
            BLOCK=_SHARE,
        )
        reached = counts.sum(dim=0, dtype=torch.int64).cumsum(0)
        found = torch.searchsorted(reached, wanted)
        wanted -= torch.where(found > 0, reached[(found - 1).clamp(min=0)], 0)
        prefix = (prefix << _DIGIT) | found
    blocks = -(-numel // _BLOCK)
    equal, bad = torch.empty(2, blocks, dtype=torch.int32, device=device)
    launch(_ties, blocks, device, values, prefix, equal, bad, numel, BLOCK=_BLOCK)
    before = equal.cumsum(0, dtype=torch.int64) - equal
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
        BLOCK=_BLOCK,
    )
    if bool(bad.any()):
        raise InputError("a value is NaN, which is neither small nor large.")
