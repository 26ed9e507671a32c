"""Compiled CPU path of ``snapshot_delta`` into bfloat16: one pass, 8 bytes read, 2 written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import CHUNK, compiled
from cmd_plugin.kernels._threads import in_threads

__all__ = ["snapshot_delta"]

_NAN = np.uint16(0x7FC0)


@compiled
def _subtract(weights, base, out):
    """Fill ``out`` [n] uint16 with the bits of the differences in bfloat16."""
    difference = np.empty(CHUNK, dtype=np.float32)
    bits = difference.view(np.uint32)
    for start in range(0, weights.size, CHUNK):
        stop = min(start + CHUNK, weights.size)
        w, b, o = weights[start:stop], base[start:stop], out[start:stop]
        for i in range(w.size):
            difference[i] = np.float32(w[i] - b[i])
        for i in range(w.size):
            # The upper half, rounded to nearest even; adding could turn a NaN into a number.
            x = bits[i]
            upper = np.uint16((x + np.uint32(0x7FFF) + ((x >> 16) & np.uint32(1))) >> 16)
            nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            o[i] = _NAN if nan else upper


def snapshot_delta(pieces: Sequence[tuple[Tensor, int, int]], base: Tensor, out: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.snapshot_delta`; ``pieces`` are (values, start, stop)."""
    bits, first = out.view(torch.int16).numpy().view(np.uint16), base.numpy()

    def run(piece: tuple[Tensor, int, int]) -> None:
        values, start, stop = piece
        _subtract(values.numpy(), first[start:stop], bits[start:stop])

    in_threads(run, pieces, base.numel())
