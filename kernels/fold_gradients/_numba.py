"""Compiled CPU path of ``fold_gradients``: one pass, sums by share, then over shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import SPAN, exact
from cmd_plugin.kernels._threads import in_threads, shares

__all__ = ["fold_gradients"]


@exact
def _fold(gradient, embedded, mode, scale, modes):
    """Return the sums [M] of a share; a weight that is not embedded adds zero.

    Four sums a mode take turns: most weights of a network are in few modes, and a sum has to wait
    for the one before it.
    """
    sums = np.zeros((4, modes), dtype=np.float64)
    parts = np.empty(SPAN, dtype=np.float64)
    zero = gradient.dtype.type(0.0)
    for start in range(0, gradient.size, SPAN):
        n = min(SPAN, gradient.size - start)
        any_set = np.uint8(0)
        for i in range(n):
            any_set |= embedded[np.uintp(start + i)]
        if any_set:
            for i in range(n):
                j = np.uintp(start + i)
                part = np.float64(scale[j]) * np.float64(gradient[j])
                parts[i] = part if embedded[j] else 0.0
                gradient[j] = zero if embedded[j] else gradient[j]
            for i in range(0, n - 3, 4):
                j = np.uintp(start + i)
                sums[0, mode[j]] += parts[i]
                sums[1, mode[j + np.uintp(1)]] += parts[i + 1]
                sums[2, mode[j + np.uintp(2)]] += parts[i + 2]
                sums[3, mode[j + np.uintp(3)]] += parts[i + 3]
            for i in range(n // 4 * 4, n):
                sums[0, mode[np.uintp(start + i)]] += parts[i]
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def fold_gradients(
    gradient: Tensor, embedded: Tensor, mode: Tensor, scale: Tensor, modes: int
) -> Tensor:
    """See :func:`cmd_plugin.kernels.fold_gradients`."""
    flags = embedded.view(torch.uint8)
    arrays = [tensor.numpy() for tensor in (gradient, flags, mode, scale)]

    def run(at: slice) -> np.ndarray:
        sums: np.ndarray = _fold(*(array[at] for array in arrays), modes)
        return sums

    parts = in_threads(run, shares(len(gradient)), len(gradient))
    return torch.from_numpy(np.sum([np.zeros(modes), *parts], axis=0))
