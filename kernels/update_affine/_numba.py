"""Compiled CPU path of ``update_affine``: one pass, 13 bytes read and 8 written per weight.

One call walks all tensors by their addresses, so a network of many small ones costs no Python per
tensor. Gains are looked up for a short span of weights at a time, two modes at once: while a long
look-up runs, the memory would stand idle. Everything is one function body, because with spans this
short a call costs as much as the arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import (
    SPAN,
    array,
    compiled,
    in_shares,
    pair_table,
    two_bytes,
    vector,
)
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["sum_of_squares", "update_affine"]


@compiled
def _update(addresses, starts, low, high, mode, slope, mean, total, gains, blend, decay, out):
    pairs = np.empty(SPAN // 2, dtype=gains.dtype)
    gain = pairs.view(mean.dtype)
    modes = mode.ctypes.data
    zero, one = mean.dtype.type(0.0), mean.dtype.type(1.0)
    for piece in range(low, high):
        first, size = starts[piece], starts[piece + 1] - starts[piece]
        weights = vector(addresses[piece], size, mean)
        squares = 0.0
        for at in range(0, size, SPAN):
            n, start = min(SPAN, size - at), first + at
            for i in range(n // 2):
                pairs[i] = gains[two_bytes(modes + start + 2 * i)]
            if n % 2:
                pairs[n // 2] = gains[mode[start + n - 1]]
            part = zero
            for i in range(n):
                j = np.uintp(start + i)
                innovation = weights[np.uintp(at + i)] - mean[j]
                part += innovation * innovation
                mean[j] += innovation * blend
                slope[j] = slope[j] * decay + innovation * gain[i]
            if total.size:
                # The mean has moved: w - new mean = (1 - blend) (w - old mean).
                for i in range(n):
                    j = np.uintp(start + i)
                    rest = weights[np.uintp(at + i)] - mean[j]
                    total[j] = total[j] * decay + rest * rest / (one - blend)
            squares += part
        out[piece] = squares


@compiled
def _square(addresses, starts, low, high, like, out):
    """Sum four quarters of a piece side by side: one stream of memory is slow to arrive."""
    for piece in range(high - 1, low - 1, -1):
        size = starts[piece + 1] - starts[piece]
        weights = vector(addresses[piece], size, like)
        quarter = np.uintp(size // 4)
        squares = 0.0
        for at in range(0, size // 4, SPAN):
            part = like.dtype.type(0.0)
            for i in range(min(SPAN, size // 4 - at)):
                j = np.uintp(at + i)
                k = j + quarter
                p, q = weights[j], weights[k]
                r, s = weights[k + quarter], weights[k + quarter + quarter]
                part += (p * p + q * q) + (r * r + s * s)
            squares += part
        for i in range(size // 4 * 4, size):
            squares += weights[i] * weights[i]
        out[piece] = squares


def update_affine(
    weights: FlatView,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_affine`; all weights contiguous in the state's dtype."""
    means = mean.numpy()
    number = means.dtype.type
    state = (mode.numpy(), slope.numpy(), means, array(total, mean))
    constants = (pair_table(gain, mean), number(blend), number(decay))
    squares = np.empty(weights.addresses()[0].size)
    in_shares(weights, lambda *share: _update(*share, *state, *constants, squares))
    # In the order of the pieces: it does not depend on which thread took which.
    return torch.tensor(float(squares.sum()), dtype=torch.float64)


def sum_of_squares(weights: FlatView) -> float:
    """See :meth:`FlatView.sum_of_squares`; all weights contiguous in the view's dtype."""
    like = torch.empty(0, dtype=weights.dtype).numpy()
    squares = np.empty(weights.addresses()[0].size)
    # What a step of the optimizer wrote last may still be in the cache, and what is looked at last
    # is what the update reads first.
    in_shares(weights, lambda *share: _square(*share, like, squares), backwards=True)
    return float(squares.sum())
