"""Random rotations of vectors of any length, made of Hadamard transforms and signs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["hadamard", "rotate", "rotate_back"]

_ROUNDS = 2
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def hadamard(x: Tensor) -> Tensor:
    r"""Return :math:`H x / \sqrt{n}`, the orthonormal Walsh-Hadamard transform; its own inverse.

    In n log n additions. Nothing but additions and one product is computed for each value, so that
    all machines get the same bits.

    Args:
        x: [n] with n a power of two, float32 or float64.
    """
    count, half = x.numel(), 1  # of nothing the transform is nothing
    while half < count:
        pairs = x.reshape(-1, 2, half)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        half *= 2
    return x.reshape(count) * (1.0 / math.sqrt(max(1, count)))


def rotate(x: Tensor, seed: int) -> Tensor:
    """Return a vector rotated at random: every value looks like a draw from one Gaussian.

    A round deals the values out and transforms first the leading 2^k of them and then the last,
    each time after random changes of sign; 2^k is the largest power of two within the length.
    Nothing is padded, so as many values come out as went in. After two rounds all of them have the
    same variance, also where one value held everything.

    Args:
        x: [n], float32 or float64; unchanged.
        seed: Which rotation, 0 to 2**64 - 1.
    """
    x, order, size = x.clone(), _order(x.numel()), _block(x.numel())
    for signs in _signs(x, seed):
        x = x[order] * signs[0]
        x[:size] = hadamard(x[:size])
        x *= signs[1]  # without it the second transform would undo the first
        x[-size:] = hadamard(x[-size:])
    return x


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """Undo :func:`rotate` with the same seed, up to rounding."""
    x, order, size = x.clone(), _order(x.numel()), _block(x.numel())
    for signs in _signs(x, seed).flip(0):
        x[-size:] = hadamard(x[-size:])
        x *= signs[1]
        x[:size] = hadamard(x[:size])
        dealt = torch.empty_like(x)
        dealt[order] = x * signs[0]
        x = dealt
    return x


def _block(count: int) -> int:
    """Return the largest power of two up to ``count``, 1 for nothing."""
    return 1 << max(0, count.bit_length() - 1)


def _order(count: int) -> Tensor:
    """Every place once, neighbours far apart: so each block gets its share of each region."""
    step = max(1, round(_GOLDEN * count))
    while math.gcd(step, max(1, count)) > 1:
        step += 1
    return torch.arange(count) * step % max(1, count)


def _signs(like: Tensor, seed: int) -> Tensor:
    """[rounds, 2, n] of 1 and -1. Numpy promises the raw bits of a generator, not more."""
    count = _ROUNDS * 2 * like.numel()
    words = np.random.PCG64(seed).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count).reshape(_ROUNDS, 2, -1)
    return 1.0 - 2.0 * torch.from_numpy(bits).to(like.dtype)
