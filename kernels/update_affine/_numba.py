"""Compiled CPU path of ``update_affine``: one pass, 13 bytes read and 8 written per weight.

One call walks all tensors by their addresses, so a network of many small ones costs no Python per
tensor. Gains are looked up for a short span of weights at a time, two modes at once: while a long
look-up runs, the memory would stand idle. Everything is one function body, because with spans this
short a call costs as much as the arithmetic.
"""

from __future__ import annotations

from itertools import pairwise
from math import fsum
from typing import Any

import numpy as np
import torch
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from cmd_plugin.kernels._numba import CHUNK, array, compiled, numbers
from cmd_plugin.kernels._threads import in_threads
from cmd_plugin.kernels.flat_view import FlatView

__all__ = ["sum_of_squares", "update_affine"]

_SHARE = 1 << 19  # weights a thread takes at a time
_SPAN = 128  # weights whose gains are looked up before the arithmetic


@intrinsic
def _typed(_: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to values of the dtype of an array."""
    target = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return target(address, like), generate


_pointer: Any = _typed  # its first argument is the compiler's own


@compiled
def _update(addresses, starts, low, high, mode, slope, mean, total, pairs, blend, decay, out):
    wide = np.empty(_SPAN // 2, dtype=pairs.dtype)
    gains = wide.view(mean.dtype)
    zero, one = mean.dtype.type(0.0), mean.dtype.type(1.0)
    for piece in range(low, high):
        first, size = starts[piece], starts[piece + 1] - starts[piece]
        weights = carray(_pointer(addresses[piece], mean), size)
        squares = 0.0
        for at in range(0, size, _SPAN):
            n = min(_SPAN, size - at)
            start, stop = first + at, first + at + n
            w, m = weights[at : at + n], mode[start:stop]
            s, b = slope[start:stop], mean[start:stop]
            for i in range(n // 2):
                wide[i] = pairs[np.uint32(m[2 * i]) | (np.uint32(m[2 * i + 1]) << np.uint32(8))]
            if n % 2:
                wide[n // 2] = pairs[m[n - 1]]
            part = zero
            for i in range(n):
                innovation = w[i] - b[i]
                part += innovation * innovation
                b[i] += innovation * blend
                s[i] = s[i] * decay + innovation * gains[i]
            if total.size:
                # The mean has moved: w - new mean = (1 - blend) (w - old mean).
                v = total[start:stop]
                for i in range(n):
                    rest = w[i] - b[i]
                    v[i] = v[i] * decay + rest * rest / (one - blend)
            squares += part
        out[piece] = squares


@compiled
def _square(addresses, starts, low, high, like, out):
    for piece in range(low, high):
        size = starts[piece + 1] - starts[piece]
        weights = carray(_pointer(addresses[piece], like), size)
        squares = 0.0
        for at in range(0, size, CHUNK):
            part = like.dtype.type(0.0)
            for value in weights[at : min(size, at + CHUNK)]:
                part += value * value
            squares += part
        out[piece] = squares


def _pair_gains(gain: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the gains [M] of two neighbouring modes as one value of twice the size, [256 M].

    It is addressed by the two bytes read as one number.
    """
    pairs = np.zeros((gain.size, 256, 2), gain.dtype)  # [second mode, first mode, gain]
    pairs[:, : gain.size, 0] = gain
    pairs[:, :, 1] = gain[:, None]
    return pairs.view(np.uint64 if gain.dtype == np.float32 else np.complex128).reshape(-1)


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
    addresses, starts = weights.addresses()
    means = mean.numpy()
    state = (mode.numpy(), slope.numpy(), means, array(total, mean))
    number = means.dtype.type
    constants = (_pair_gains(numbers(gain, mean)), number(blend), number(decay))
    squares = np.empty(addresses.size)

    def run(share: tuple[int, int]) -> None:
        _update(addresses, starts, *share, *state, *constants, squares)

    in_threads(run, _piece_shares(starts), weights.numel)
    # One exact sum over pieces: it does not depend on which thread took which.
    return torch.tensor(fsum(squares), dtype=torch.float64)


def sum_of_squares(weights: FlatView) -> float:
    """See :meth:`FlatView.sum_of_squares`; all weights contiguous in the view's dtype."""
    addresses, starts = weights.addresses()
    like = torch.empty(0, dtype=weights.dtype).numpy()
    squares = np.empty(addresses.size)

    def run(share: tuple[int, int]) -> None:
        _square(addresses, starts, *share, like, squares)

    in_threads(run, _piece_shares(starts), weights.numel)
    return float(squares.sum())  # not fsum, which raises where infinities meet


def _piece_shares(starts: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Return which pieces, from and to, a thread takes at a time.

    Short shares, taken as threads get free: after an optimizer's step PyTorch's own threads keep a
    processor busy for some milliseconds.
    """
    pieces, numel = starts.size - 1, int(starts[-1])
    count = max(1, numel // _SHARE)
    if count == 1:
        return [(0, pieces)]
    bounds = np.searchsorted(starts[:-1], np.linspace(0, numel, count + 1)).tolist()
    return list(pairwise(bounds))
