"""Triton path of ``point_importance``: the features are read once, for norms and counts together.

A program takes a block of channels of one cloud and sweeps its tokens: running maxima with their
positions stay in registers, and the block's part of each token's norm goes to memory. Integer
atomics count the winners, so counts are exact; a second small pass adds the parts in a fixed order,
so norms do not depend on scheduling. Traffic: the features once, and 1/ROWS of them for the parts.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["point_importance"]

_ROWS, _COLUMNS = 32, 128


@triton.jit
def _sweep(
    features,
    mask,
    parts,
    wins,
    channels,
    tokens,
    cloud_stride,
    channel_stride,
    token_stride,
    ORDER: tl.constexpr,
    MASKED: tl.constexpr,
    WINS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cloud = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    features += cloud * cloud_stride + row[:, None].to(tl.int64) * channel_stride
    parts += (cloud * tl.num_programs(0) + block) * tokens
    number = tl.float64 if WIDE else tl.float32
    best = tl.full((ROWS,), float("-inf"), number)
    winner = tl.full((ROWS,), 2147483647, tl.int32)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = column < tokens
        inside = (row < channels)[:, None] & real[None, :]
        value = tl.load(features + column[None, :] * token_stride, inside, 0.0).to(number)
        size = tl.abs(value)
        if ORDER == 1:
            part = tl.sum(size, axis=0)
        elif ORDER == 2:
            part = tl.sum(size * size, axis=0)
        else:
            part = tl.max(size, axis=0)
        tl.store(parts + column, part, real)
        if WINS:
            if MASKED:
                real = real & (tl.load(mask + cloud * tokens + column, real, 0) != 0)
            value = tl.where(real[None, :], value, float("-inf"))
            top = tl.max(value, axis=1)
            # Of equal tokens the lowest position.
            tied = real[None, :] & (value == top[:, None])
            first = tl.min(tl.where(tied, column[None, :], 2147483647), axis=1)
            better = (top > best) | ((winner == 2147483647) & (first < 2147483647))
            best = tl.where(better, top, best)
            winner = tl.where(better, first, winner)
    if WINS:
        counted = (row < channels) & (winner < tokens)
        tl.atomic_add(wins + cloud * tokens + winner, 1, counted)


@triton.jit
def _combine(
    parts,
    mask,
    norm,
    blocks,
    tokens,
    ORDER: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cloud = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < tokens
    parts += cloud * blocks * tokens
    total = tl.zeros((COLUMNS,), tl.float64 if WIDE else tl.float32)
    for block in range(blocks):
        part = tl.load(parts + block * tokens + column, real, 0.0)
        if ORDER == 0:
            total = tl.maximum(total, part)
        else:
            total += part
    if ORDER == 2:
        total = tl.sqrt(total)
    if MASKED:
        total = tl.where(tl.load(mask + cloud * tokens + column, real, 0) != 0, total, 0.0)
    tl.store(norm + cloud * tokens + column, total, real)


def point_importance(
    features: Tensor, mask: Tensor | None, order: float, *, wins: bool
) -> tuple[Tensor, Tensor | None]:
    """Return [B, M] norms and, if asked for, [B, M] int64 counts; ties go to the first token."""
    batch, channels, tokens = features.shape
    wide = features.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    device = features.device
    blocks = triton.cdiv(channels, _ROWS)
    parts = torch.empty(batch, blocks, tokens, dtype=dtype, device=device)
    norm = torch.empty(batch, tokens, dtype=dtype, device=device)
    counts = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
    # A pointer is needed even where none is read.
    flags = counts if mask is None else mask.to(torch.int8).contiguous()
    options = {"ORDER": {1.0: 1, 2.0: 2}.get(order, 0), "MASKED": mask is not None, "WIDE": wide}
    on = torch.cuda.device(device) if features.is_cuda else nullcontext()
    with on:
        _sweep[(blocks, batch)](
            features,
            flags,
            parts,
            counts,
            channels,
            tokens,
            *features.stride(),
            **options,
            WINS=wins,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
        _combine[(triton.cdiv(tokens, _COLUMNS), batch)](
            parts, flags, norm, blocks, tokens, **options, COLUMNS=_COLUMNS, num_warps=4
        )
    return norm, counts.long() if wins else None
