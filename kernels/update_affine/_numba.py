"""Compiled CPU path of ``update_affine``: one pass, 13 bytes read and 8 written per weight.

PyTorch alone makes five passes over cache-resident blocks and looks the gains up on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import CHUNK, array, compiled, numbers
from cmd_plugin.kernels._threads import in_threads

__all__ = ["update_affine", "update_chunk"]


@compiled
def update_chunk(weights, mode, slope, mean, total, gain, blend, decay, gains):
    """Update n weights in place and return the sum of e^2; ``gains`` is scratch of at least n."""
    for i in range(mode.size):
        gains[i] = gain[mode[i]]
    part = mean.dtype.type(0.0)
    for i in range(mode.size):
        innovation = weights[i] - mean[i]
        mean[i] += innovation * blend
        slope[i] = slope[i] * decay + innovation * gains[i]
        part += innovation * innovation
    if total.size:
        # The mean has moved: w - new mean = (1 - blend) (w - old mean).
        one = mean.dtype.type(1.0)
        for i in range(mode.size):
            rest = weights[i] - mean[i]
            total[i] = total[i] * decay + rest * rest / (one - blend)
    return part


@compiled
def _update(weights, mode, slope, mean, total, gain, blend, decay):
    squares = 0.0
    gains = np.empty(CHUNK, dtype=mean.dtype)
    for start in range(0, weights.size, CHUNK):
        stop = min(start + CHUNK, weights.size)
        squares += update_chunk(
            weights[start:stop],
            mode[start:stop],
            slope[start:stop],
            mean[start:stop],
            total[start:stop],
            gain,
            blend,
            decay,
            gains,
        )
    return squares


def update_affine(
    pieces: Sequence[tuple[Tensor, int, int]],
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_affine`; ``pieces`` are (values, start, stop)."""
    number = mean[:0].numpy().dtype.type
    modes, slopes, means = mode.numpy(), slope.numpy(), mean.numpy()
    totals, gains = array(total, mean), numbers(gain, mean)

    def run(piece: tuple[Tensor, int, int]) -> float:
        values, start, stop = piece
        at = slice(start, stop)
        return float(
            _update(
                values.numpy(),
                modes[at],
                slopes[at],
                means[at],
                totals[at],
                gains,
                number(blend),
                number(decay),
            )
        )

    # One exact sum over pieces: it does not depend on which thread took which.
    return torch.tensor(fsum(in_threads(run, pieces, mean.numel())), dtype=torch.float64)
