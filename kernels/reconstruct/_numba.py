"""Compiled CPU path of ``reconstruct``: one pass, 9 bytes read and 4 written per weight."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cmd_plugin.kernels._numba import SPAN, array, exact, in_shares, pair_table, two_bytes, vector
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["reconstruct"]


@exact
def _fill(addresses, starts, low, high, mode, slope, mean, total, steps, energies):
    pairs, others = np.empty(SPAN // 2, steps.dtype), np.empty(SPAN // 2, steps.dtype)
    moved, energy = pairs.view(mean.dtype), others.view(mean.dtype)
    modes = mode.ctypes.data
    zero, one = mean.dtype.type(0.0), mean.dtype.type(1.0)
    for piece in range(low, high):
        first, size = starts[piece], starts[piece + 1] - starts[piece]
        out = vector(addresses[piece], size, mean)
        for at in range(0, size, SPAN):
            n, start = min(SPAN, size - at), first + at
            for i in range(n // 2):
                pairs[i] = steps[two_bytes(modes + start + 2 * i)]
            if n % 2:
                pairs[n // 2] = steps[mode[start + n - 1]]
            if energies.size:
                for i in range(n // 2):
                    others[i] = energies[two_bytes(modes + start + 2 * i)]
                if n % 2:
                    others[n // 2] = energies[mode[start + n - 1]]
                for i in range(n):
                    j = np.uintp(start + i)
                    share = energy[i] * slope[j] * slope[j] / total[j]
                    share = one if share > one else share
                    # NaN too: 0 / 0 of a weight that never moved
                    moved[i] *= share if share > zero else zero
            for i in range(n):
                j = np.uintp(start + i)
                out[np.uintp(at + i)] = mean[j] + moved[i] * slope[j]


def reconstruct(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    step: Tensor,
    total: Tensor | None,
    energy: Tensor | None,
) -> None:
    """See :func:`cmd_plugin.kernels.reconstruct_into`; all weights contiguous, in its dtype."""
    state = (mode.numpy(), slope.numpy(), mean.numpy(), array(total, mean))
    tables = (pair_table(step, mean), pair_table(energy, mean))
    in_shares(weights, lambda *share: _fill(*share, *state, *tables))
