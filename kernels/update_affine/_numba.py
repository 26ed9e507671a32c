"""Compiled CPU path of ``update_affine``: one pass, 13 bytes read and 8 written per weight.

Needs numba (extra ``fast``). PyTorch alone makes five passes over cache-resident blocks and looks
the
gains up on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

__all__ = ["update_affine"]

_CHUNK = 2048  # weights whose gains are looked up before the arithmetic, in the first-level cache
_ALONE = 1 << 20  # weights below which a second thread is not worth starting


# Sums may be reordered (reassoc) so that they vectorise; nothing else is relaxed, NaN and Inf
# count.
@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _pass(weights, mode, slope, mean, gain, blend, decay, total):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    squares = 0.0
    gains = np.empty(_CHUNK, dtype=mean.dtype)
    one = mean.dtype.type(1.0)
    for start in range(0, weights.size, _CHUNK):
        count = min(_CHUNK, weights.size - start)
        w, m = weights[start : start + count], mode[start : start + count]
        s, b = slope[start : start + count], mean[start : start + count]
        for i in range(count):
            gains[i] = gain[m[i]]
        part = mean.dtype.type(0.0)
        for i in range(count):
            innovation = w[i] - b[i]
            b[i] += innovation * blend
            s[i] = s[i] * decay + innovation * gains[i]
            part += innovation * innovation
        squares += part
        if total.size:
            # The mean has moved: w - new mean = (1 - blend) (w - old mean).
            v = total[start : start + count]
            for i in range(count):
                rest = w[i] - b[i]
                v[i] = v[i] * decay + rest * rest / (one - blend)
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
) -> float:
    """See :func:`cmd_plugin.kernels.update_affine`; ``pieces`` are (values, start, stop)."""
    number = np.float64 if mean.dtype == torch.float64 else np.float32
    modes, slopes, means = mode.numpy(), slope.numpy(), mean.numpy()
    gains = gain.to(mean.dtype).numpy()
    totals = np.empty(0, number) if total is None else total.numpy()

    def run(part: Sequence[tuple[Tensor, int, int]]) -> float:
        squares = 0.0
        for values, start, stop in part:
            squares += _pass(
                values.numpy(),
                modes[start:stop],
                slopes[start:stop],
                means[start:stop],
                gains,
                number(blend),
                number(decay),
                totals[start:stop],
            )
        return squares

    threads = 1 if mean.numel() < _ALONE else torch.get_num_threads()
    if threads == 1:
        return run(pieces)
    shares = [pieces[index::threads] for index in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        # Summed in the order of the shares, not of their finishing: the result does not depend on
        # it.
        return float(sum(pool.map(run, shares)))
