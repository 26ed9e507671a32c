"""Random numbers that are a function of (seed, sample, purpose, position) and of nothing else.

A generator that is drawn from in turn gives a sample other numbers whenever the batch around it
changes. A counter-based generator (Philox 4x32-10; Salmon, Moraes, Dror, Shaw: *Parallel random
numbers: as easy as 1, 2, 3*, SC 2011) hashes a position instead: any device, any order, any batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError

__all__ = ["CounterRandom", "check_seed", "derived_seed", "philox", "sample_index"]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def check_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        InputError: If it is no integer in [0, 2^63).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise InputError(f"seed must be an integer in [0, 2^63), got {seed!r}.")
    return seed


def sample_index(index: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Return [B] int64 sample numbers on ``device``: ``index``, or 0..B-1 without one.

    Raises:
        ShapeError: If ``index`` is not [B] integers.
        InputError: If one is negative.
    """
    if index is None:
        return torch.arange(batch, device=device)
    if index.shape != (batch,) or index.is_floating_point() or index.dtype == torch.bool:
        raise ShapeError(
            f"index must be [{batch}] integers, got {tuple(index.shape)} {index.dtype}."
        )
    if batch and int(index.min()) < 0:
        raise InputError("index holds a negative sample number: count samples from 0.")
    return index.to(device, torch.int64)


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hash 128-bit counters to 128 random bits each, with Philox 4x32-10.

    Args:
        seed: Key, in [0, 2^63).
        c0: Lowest 32 bits of the counters, int64 in [0, 2^32), any shape.
        c1: The next 32 bits; the four broadcast against one another.
        c2: The next 32 bits.
        c3: The highest 32 bits.

    Returns:
        Four int64 tensors of uniform integers in [0, 2^32).
    """
    key = [seed & _LOW, seed >> 32]
    for _ in range(_ROUNDS):
        # A product of two 32-bit numbers wraps in int64, its bits are those of the unsigned one.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ key[0],
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ key[1],
            first & _LOW,
        )
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    return c0, c1, c2, c3


def derived_seed(seed: int, *numbers: int) -> int:
    """Return a seed in [0, 2^63) that is a hash of another seed and of numbers below 2^32.

    Args:
        seed: In [0, 2^63).
        *numbers: For example epoch and round; at most three.
    """
    a, b, c = (torch.tensor(number) for number in (*numbers, 0, 0, 0)[:3])
    low, high, _, _ = philox(check_seed(seed), a, b, c, torch.tensor(len(numbers)))
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


class CounterRandom:
    """Draws for B samples at once; sample i's numbers depend on (seed, index[i], purpose) only.

    Successive draws give new numbers. All samples of a batch draw equally many, so what a sample
    gets does not depend on the others.
    """

    def __init__(self, seed: int, index: Tensor, purpose: int) -> None:
        """Start the streams.

        Args:
            seed: In [0, 2^63).
            index: [B] int64 sample numbers, not negative; the draws live on its device.
            purpose: In [0, 2^32): streams of different purposes are independent.

        Raises:
            InputError: If the seed is out of range.
        """
        self._seed = check_seed(seed)
        self._low, self._high = index[:, None] & _LOW, index[:, None] >> 32
        self._purpose = torch.full_like(self._low, purpose)
        self._block = 0

    def words(self, count: int) -> Tensor:
        """Return [B, count] int64, uniform on 0..2^32-1."""
        blocks = -(-count // 4)
        position = torch.arange(self._block, self._block + blocks, device=self._low.device)
        self._block += blocks
        drawn = philox(self._seed, position[None, :], self._low, self._purpose, self._high)
        return torch.stack(drawn, dim=-1).flatten(1)[:, :count]

    def uniform(self, count: int) -> Tensor:
        """Return [B, count] float64, uniform on the open interval (0, 1)."""
        return (self.words(count).double() + 0.5) / 2.0**32

    def normal(self, count: int) -> Tensor:
        """Return [B, count] float64, standard normal, by Box and Muller's transform."""
        half = -(-count // 2)
        radius = self.uniform(half).log().mul(-2.0).sqrt()
        angle = self.uniform(half) * (2.0 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]

    def integers(self, count: int, bound: int | Tensor) -> Tensor:
        """Return [B, count] int64, uniform on 0..bound-1.

        Args:
            count: How many per sample.
            bound: One bound, or one per sample [B, 1]; a bias of bound / 2^32 is accepted.
        """
        return (self.words(count) * bound) >> 32

    def permutation(self, size: int) -> Tensor:
        """Return [B, size] int64: a uniform permutation of 0..size-1 per sample."""
        keys = (self.words(size) << 31) | (self.words(size) >> 1)  # 63 bits: no ties to speak of
        return keys.argsort(dim=1, stable=True)
