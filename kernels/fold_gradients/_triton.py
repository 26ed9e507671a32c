"""Triton path of ``fold_gradients``: sums a program and mode, then over programs in order.

No atomics: floating sums in any order would differ between processes that must keep equal weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import launch
from cmd_plugin.kernels.pointer_table import BLOCK as _BLOCK

__all__ = ["fold_gradients"]

_PROGRAMS = 1024  # enough to fill a GPU; each has M float64 sums


@triton.jit
def _fold(gradient, embedded, mode, scale, sums, numel, modes, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    block = program
    while block < blocks:
        at = block * BLOCK + tl.arange(0, BLOCK)
        ok = at < numel
        chosen = ok & (tl.load(embedded + at, ok, 0) != 0)
        m = tl.load(mode + at, ok, 0).to(tl.int32)
        g = tl.load(gradient + at, ok, 0.0)
        # What is stored depends on what was loaded: plain zeros may be stored in another layout,
        # and then one warp zeroes what another has yet to read.
        tl.store(gradient + at, tl.where(chosen, tl.zeros_like(g), g), ok)
        part = g.to(tl.float64) * tl.load(scale + at, ok, 0.0).to(tl.float64)
        for k in range(modes):
            own = sums + program * modes + k
            total = tl.sum(tl.where(chosen & (m == k), part, 0.0))
            tl.store(own, tl.load(own) + total)
        block += tl.num_programs(0)


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    """See :func:`cmd_plugin.kernels.fold_gradients`."""
    blocks = -(-len(gradient) // _BLOCK)
    programs = min(_PROGRAMS, blocks)
    sums = torch.zeros(programs, modes, dtype=torch.float64, device=gradient.device)
    launch(
        _fold,
        programs,
        gradient.device,
        gradient,
        embedded.view(torch.uint8),
        mode,
        scale,
        sums,
        len(gradient),
        modes,
        blocks,
        BLOCK=_BLOCK,
    )
    return sums.sum(dim=0)
