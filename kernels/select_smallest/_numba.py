"""Compiled CPU path of ``select_smallest``: three passes that count digits, one that marks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.errors import InputError
from cmd_plugin.kernels._numba import exact
from cmd_plugin.kernels._threads import in_threads, shares

__all__ = ["select_smallest"]

_DIGIT = 11  # bits of a digit: its 2048 counters stay in the first-level cache


@exact
def _key(bits, sign):
    """Return unsigned bits in the order of the floats they are of; both zeros give one key."""
    if bits == sign:
        return sign
    return ~bits if bits & sign else bits | sign


@exact
def _count(bits, sign, infinity, prefix, above, shift, mask, counts):
    """Count digits of keys whose upper bits are ``prefix``; return the number of NaN."""
    bad = 0
    for i in range(bits.size):
        if bits[i] & ~sign > infinity:
            bad += 1
        key = _key(bits[i], sign)
        if above == 0 or key >> above == prefix:
            counts[(key >> shift) & mask] += 1
    return bad


@exact
def _mark(bits, sign, boundary, ties, chosen):
    """Mark keys below the boundary, and the first ``ties`` at it; return how many were at it."""
    met = 0
    for i in range(bits.size):
        key = _key(bits[i], sign)
        chosen[i] = key < boundary
        if key == boundary:
            chosen[i] = met < ties
            met += 1
    return met


def select_smallest(values: Tensor, num: int, chosen: Tensor) -> None:
    """See :func:`cmd_plugin.kernels.select_smallest`; marks in ``chosen``, 1 <= num <= N."""
    double = values.dtype == torch.float64
    number, width = (np.uint64, 64) if double else (np.uint32, 32)
    bits, marks = values.numpy().view(number), chosen.numpy()
    sign = number(1 << (width - 1))
    infinity = np.array(np.inf, dtype=values.numpy().dtype).view(number)[()]
    parts = shares(len(values))
    prefix, wanted, shift = 0, num, width
    while shift:
        digit = min(_DIGIT, shift)
        above, shift = shift, shift - digit
        counts = np.zeros((len(parts), 1 << digit), dtype=np.int64)
        arguments = (
            sign,
            infinity,
            number(prefix),
            number(0 if above == width else above),
            number(shift),
            number((1 << digit) - 1),
        )
        jobs = [(bits[at], *arguments, row) for at, row in zip(parts, counts, strict=True)]
        if any(in_threads(lambda job: _count(*job), jobs, len(values))):
            raise InputError("a value is NaN, which is neither small nor large.")
        reached = counts.sum(axis=0).cumsum()
        found = int(np.searchsorted(reached, wanted))
        wanted -= int(reached[found - 1]) if found else 0
        prefix = (prefix << digit) | found
    ties = wanted
    for at in parts:
        ties -= min(ties, int(_mark(bits[at], sign, number(prefix), ties, marks[at])))
