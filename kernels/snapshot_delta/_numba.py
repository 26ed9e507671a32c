"""Compiled CPU path of ``snapshot_delta`` into bfloat16: one pass, 8 bytes read, 2 written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import compiled, in_shares, vector
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["snapshot_delta"]

_NAN = np.uint16(0x7FC0)
_CHUNK = 1024  # differences that are held before they are rounded


@compiled
def _subtract(addresses, starts, low, high, base, out):
    """Fill ``out`` [N] uint16 with the bits of the differences in bfloat16."""
    difference = np.empty(_CHUNK, dtype=np.float32)
    bits = difference.view(np.uint32)
    for piece in range(low, high):
        first, size = starts[piece], starts[piece + 1] - starts[piece]
        weights = vector(addresses[piece], size, base)
        for at in range(0, size, _CHUNK):
            n = min(_CHUNK, size - at)
            for i in range(n):
                k = np.uintp(at + i)
                difference[i] = np.float32(weights[k] - base[np.uintp(first + at + i)])
            for i in range(n):
                # The upper half, rounded to nearest even; adding could turn a NaN into a number.
                x = bits[i]
                upper = np.uint16((x + np.uint32(0x7FFF) + ((x >> 16) & np.uint32(1))) >> 16)
                nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                out[np.uintp(first + at + i)] = _NAN if nan else upper


def snapshot_delta(weights: FlatView, base: Tensor, out: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.snapshot_delta`; all weights contiguous, in base's dtype."""
    bits, first = out.view(torch.int16).numpy().view(np.uint16), base.numpy()
    in_shares(weights, lambda *share: _subtract(*share, first, bits))
