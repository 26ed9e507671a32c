"""Compiled CPU path of ``apply_embedding``: reads a byte a weight, and more near a set one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import SPAN, exact, in_shares, pair_table, two_bytes, vector
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["apply_embedding"]


@exact
def _apply(addresses, starts, low, high, embedded, mode, scale, offset, profile):
    pairs = np.empty(SPAN // 2, dtype=profile.dtype)
    values = pairs.view(scale.dtype)
    modes = mode.ctypes.data
    for piece in range(low, high):
        first, size = starts[piece], starts[piece + 1] - starts[piece]
        weights = vector(addresses[piece], size, scale)
        for at in range(0, size, SPAN):
            n, start = min(SPAN, size - at), first + at
            any_set = np.uint8(0)
            for i in range(n):
                any_set |= embedded[np.uintp(start + i)]
            if any_set:
                for i in range(n // 2):
                    pairs[i] = profile[two_bytes(modes + start + 2 * i)]
                if n % 2:
                    pairs[n // 2] = profile[mode[start + n - 1]]
                for i in range(n):
                    j, k = np.uintp(start + i), np.uintp(at + i)
                    modelled = scale[j] * values[i] + offset[j]
                    weights[k] = modelled if embedded[j] else weights[k]


def apply_embedding(
    weights: FlatView,
    embedded: Tensor,
    mode: Tensor,
    scale: Tensor,
    offset: Tensor,
    profile: Tensor,
) -> None:
    """See :func:`cmd_plugin.kernels.apply_embedding`; all weights contiguous, in its dtype."""
    state = (embedded.view(torch.uint8).numpy(), mode.numpy(), scale.numpy(), offset.numpy())
    table = pair_table(profile, scale)
    in_shares(weights, lambda *share: _apply(*share, *state, table))
