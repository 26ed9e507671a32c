"""Radix selection in PyTorch: a histogram a digit, then one pass that marks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels.flat_view import BLOCK

__all__ = ["select_smallest"]

_DIGIT = 11  # bits of a digit: its 2048 counters stay in the first-level cache


def select_smallest(values: Tensor, num: int, chosen: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.select_smallest`; marks in ``chosen``, 1 <= num <= N."""
    boundary, ties = _boundary(values, num)
    for start, keys in _keys(values):
        block = chosen[start : start + len(keys)]
        torch.lt(keys, boundary, out=block)
        if ties:
            equal = keys == boundary
            block |= equal & (equal.cumsum(0) <= ties)
            ties -= min(ties, int(equal.sum()))


def _boundary(values: Tensor, num: int) -> tuple[int, int]:
    """Return the key of the num-th smallest value, and how many of its equals are wanted."""
    width = 64 if values.dtype == torch.float64 else 32
    prefix, shift, wanted = 0, width, num  # all keys start alike: they have no bits before the top
    while shift:
        bits = min(_DIGIT, shift)
        top = shift == width
        # The top digit is signed; the others count from 0.
        base = 1 << (bits - 1) if top else 0
        counts = torch.zeros(1 << bits, dtype=torch.int64, device=values.device)
        for _, keys in _keys(values, check=top):
            inside = keys if top else keys[(keys >> shift) == prefix]
            digit = inside >> (shift - bits)
            digit = digit + base if top else digit & ((1 << bits) - 1)
            counts += torch.bincount(digit, minlength=1 << bits)
        reached = counts.cumsum(0).cpu()
        found = int(torch.searchsorted(reached, wanted))
        wanted -= int(reached[found - 1]) if found else 0
        prefix = found - base if top else (prefix << bits) | found
        shift -= bits
    return prefix, wanted


def _keys(values: Tensor, *, check: bool = False) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, keys) block by block: signed integers in the order of the values."""
    double = values.dtype == torch.float64
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        block = (block if double else block.float()) + 0.0  # -0.0 becomes 0.0, which equals it
        if check and bool(block.isnan().any()):
            raise InputError("a value is NaN, which is neither small nor large.")
        bits = block.view(torch.int64 if double else torch.int32)
        # Of negative floats, larger bits mean a smaller value: turn all but the sign round.
        largest = torch.iinfo(bits.dtype).max
        yield start, bits ^ ((bits >> (63 if double else 31)) & largest)
