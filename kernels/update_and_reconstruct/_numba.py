"""Compiled CPU path of ``update_and_reconstruct``: 13 bytes read and 12 written per weight."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import CHUNK, array, compiled, exact, model_chunk, nothing, numbers
from cmd_plugin.kernels._threads import in_threads

__all__ = ["update_and_reconstruct"]


@compiled
def _update_chunk(weights, mode, slope, mean, total, gain, blend, decay, gains):
    """Update n weights in place and return the sum of e^2; ``gains`` is scratch of at least n."""
    zero, one = mean.dtype.type(0.0), mean.dtype.type(1.0)
    limit = mean.dtype.type(np.inf)
    for i in range(mode.size):
        gains[i] = gain[mode[i]]
    part = zero
    for i in range(mode.size):
        innovation = weights[i] - mean[i]
        square = innovation * innovation
        part += square
        innovation = innovation if square < limit else zero
        mean[i] += innovation * blend
        slope[i] = slope[i] * decay + innovation * gains[i]
    if total.size:
        # The mean has moved: w - new mean = (1 - blend) (w - old mean).
        for i in range(mode.size):
            rest = weights[i] - mean[i]
            square = rest * rest
            square = square if square < limit else zero
            total[i] = total[i] * decay + square / (one - blend)
    return part


@exact
def _both(weights, mode, slope, mean, total, gain, step, energy, blend, decay, out):
    squares = 0.0
    scratch = np.empty(CHUNK, dtype=mean.dtype)
    for start in range(0, weights.size, CHUNK):
        stop = min(start + CHUNK, weights.size)
        m, s, b = mode[start:stop], slope[start:stop], mean[start:stop]
        v = total[start:stop]
        squares += _update_chunk(weights[start:stop], m, s, b, v, gain, blend, decay, scratch)
        model_chunk(m, s, b, v, step, energy, scratch, out[start:stop])
    return squares


def update_and_reconstruct(
    pieces: Sequence[tuple[Tensor, int, int]],
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    gain: Tensor,
    step: Tensor,
    blend: float,
    decay: float,
    total: Tensor | None,
    energy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See :func:`cmd_plugin.kernels.update_and_reconstruct`; pieces are (values, start, stop)."""
    number = nothing(mean).dtype.type
    modes, slopes, means, outs = mode.numpy(), slope.numpy(), mean.numpy(), out.numpy()
    totals, gains = array(total, mean), numbers(gain, mean)
    steps, energies = numbers(step, mean), numbers(energy, mean)

    def run(piece: tuple[Tensor, int, int]) -> float:
        values, start, stop = piece
        at = slice(start, stop)
        return float(
            _both(
                values.numpy(),
                modes[at],
                slopes[at],
                means[at],
                totals[at],
                gains,
                steps,
                energies,
                number(blend),
                number(decay),
                outs[at],
            )
        )

    return torch.tensor(fsum(in_threads(run, pieces, mean.numel())), dtype=torch.float64)
