"""Triton path of ``fold_gradients``: sums of a program and mode, then over programs in order.

A program walks over its share once for every ten modes, whose sums stay in registers, a float64
for each lane; it writes them once. No atomics: floating sums in any order would differ between
processes that must keep equal weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import launch

__all__ = ["fold_gradients"]

_BLOCK = 256  # a lane a thread: its ten float64 sums are 20 registers; of two lanes some spill
_PROGRAMS = 4096  # enough to fill a GPU


@triton.jit
def _fold(
    gradient,
    embedded,
    mode,
    scale,
    sums,
    first,
    numel,
    modes,
    blocks,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for group in range(0, modes, 10):
        s0 = tl.zeros([BLOCK], dtype=tl.float64)
        s1 = tl.zeros([BLOCK], dtype=tl.float64)
        s2 = tl.zeros([BLOCK], dtype=tl.float64)
        s3 = tl.zeros([BLOCK], dtype=tl.float64)
        s4 = tl.zeros([BLOCK], dtype=tl.float64)
        s5 = tl.zeros([BLOCK], dtype=tl.float64)
        s6 = tl.zeros([BLOCK], dtype=tl.float64)
        s7 = tl.zeros([BLOCK], dtype=tl.float64)
        s8 = tl.zeros([BLOCK], dtype=tl.float64)
        s9 = tl.zeros([BLOCK], dtype=tl.float64)
        block = program
        while block < blocks:
            at = (first + block) * BLOCK + lane
            ok = lane < BLOCK if WHOLE else at < numel
            chosen = tl.load(embedded + at, ok, 0) != 0
            m = tl.load(mode + at, ok, 0).to(tl.int32)
            g = tl.load(gradient + at, ok, 0.0)
            part = g.to(tl.float64) * tl.load(scale + at, ok, 0.0).to(tl.float64)
            part = tl.where(chosen, part, 0.0)
            s0 += tl.where(m == group + 0, part, 0.0)
            s1 += tl.where(m == group + 1, part, 0.0)
            s2 += tl.where(m == group + 2, part, 0.0)
            s3 += tl.where(m == group + 3, part, 0.0)
            s4 += tl.where(m == group + 4, part, 0.0)
            s5 += tl.where(m == group + 5, part, 0.0)
            s6 += tl.where(m == group + 6, part, 0.0)
            s7 += tl.where(m == group + 7, part, 0.0)
            s8 += tl.where(m == group + 8, part, 0.0)
            s9 += tl.where(m == group + 9, part, 0.0)
            if group + 10 >= modes:
                # What is stored depends on what was loaded: plain zeros may be stored in another
                # layout, and then one warp zeroes what another has yet to read.
                tl.store(gradient + at, tl.where(chosen, tl.zeros_like(g), g), ok)
            block += tl.num_programs(0)
        own = sums + program * modes + group
        tl.store(own + 0, tl.sum(s0), group + 0 < modes)
        tl.store(own + 1, tl.sum(s1), group + 1 < modes)
        tl.store(own + 2, tl.sum(s2), group + 2 < modes)
        tl.store(own + 3, tl.sum(s3), group + 3 < modes)
        tl.store(own + 4, tl.sum(s4), group + 4 < modes)
        tl.store(own + 5, tl.sum(s5), group + 5 < modes)
        tl.store(own + 6, tl.sum(s6), group + 6 < modes)
        tl.store(own + 7, tl.sum(s7), group + 7 < modes)
        tl.store(own + 8, tl.sum(s8), group + 8 < modes)
        tl.store(own + 9, tl.sum(s9), group + 9 < modes)


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    """See :func:`cmd_plugin.kernels.fold_gradients`."""
    numel, device = len(gradient), gradient.device
    blocks = numel // _BLOCK
    programs = min(_PROGRAMS, blocks)
    sums = torch.zeros(programs + 1, modes, dtype=torch.float64, device=device)
    arguments = (gradient, embedded.view(torch.uint8), mode, scale)
    whole = (*arguments, sums, 0, numel, modes, blocks)
    launch(_fold, programs, device, *whole, WHOLE=True, BLOCK=_BLOCK)
    if numel % _BLOCK:
        rest = (*arguments, sums[programs:], blocks, numel, modes, 1)
        launch(_fold, 1, device, *rest, WHOLE=False, BLOCK=_BLOCK)
    return sums.sum(dim=0)
