"""Triton path of ``curve_walk``: one program per 32 walks, Philox in registers, one load a step."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels.curve_walk.reference import PURPOSE as _PURPOSE

__all__ = ["curve_walk"]

_WALKS = 32
PURPOSE: tl.constexpr = tl.constexpr(_PURPOSE)


@triton.jit
def _pick(word, choices):
    return ((word.to(tl.uint64) * choices) >> 32).to(tl.int64)


@triton.jit
def _walk(
    neighbours, start, index, path, seed, total, walks, size, choices, length, LANES: tl.constexpr
):
    walker = tl.program_id(0) * LANES + tl.arange(0, LANES)
    ok = walker < total
    sample = walker // walks
    number = tl.load(index + sample, ok, 0)
    low = (number & 0xFFFFFFFF).to(tl.uint32)
    high = (number >> 32).to(tl.uint32)
    stream = ((walker % walks) ^ PURPOSE).to(tl.uint32)
    table = neighbours + sample.to(tl.int64) * size * choices
    out = path + walker.to(tl.int64) * length
    here = tl.load(start + walker, ok, 0)
    for block in range(tl.cdiv(length, 4)):
        counter = tl.full((LANES,), block, tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter, low, stream, high)
        tl.store(out + block * 4, here, ok)
        here = tl.load(table + here * choices + _pick(w0, choices), ok, 0)
        tl.store(out + block * 4 + 1, here, ok & (block * 4 + 1 < length))
        here = tl.load(table + here * choices + _pick(w1, choices), ok, 0)
        tl.store(out + block * 4 + 2, here, ok & (block * 4 + 2 < length))
        here = tl.load(table + here * choices + _pick(w2, choices), ok, 0)
        tl.store(out + block * 4 + 3, here, ok & (block * 4 + 3 < length))
        here = tl.load(table + here * choices + _pick(w3, choices), ok, 0)


def curve_walk(neighbours: Tensor, start: Tensor, length: int, seed: int, index: Tensor) -> Tensor:
    """Return [B, A, length] int64 positions; see the public function for the arguments."""
    batch, size, choices = neighbours.shape
    walks = start.shape[1]
    path = torch.empty(batch, walks, length, dtype=torch.int64, device=start.device)
    total = batch * walks
    if total:
        on = torch.cuda.device(start.device) if start.is_cuda else nullcontext()
        with on:
            _walk[(triton.cdiv(total, _WALKS),)](
                neighbours.contiguous(),
                start.contiguous(),
                index.contiguous(),
                path,
                seed,
                total,
                walks,
                size,
                choices,
                length,
                LANES=_WALKS,
                num_warps=1,
            )
    return path
