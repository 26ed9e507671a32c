"""Compiled CPU path of ``assign_and_fit``: a tile of trajectories is read once and stays in cache.

A tile [T, W] is converted, made relative to its first snapshot and centred; then the products with
four snapshots of two modes at a time are summed, eight multiply-adds for every two results that are
loaded and stored. Nothing of size N is held but the result.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cmd_plugin.kernels._numba import compiled, nothing
from cmd_plugin.kernels._threads import in_threads, shares
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF

__all__ = ["assign_and_fit"]

_TILE = 1 << 17  # bytes of a tile: it stays in a second-level cache


@compiled
def _load(stored, bits, base, start, x, pivot):
    """Fill ``x`` [T, >= n] with rows relative to the first snapshot, ``pivot`` [n] with that."""
    count = pivot.size
    begin = 0
    if base.size:
        begin = 1
        for i in range(count):
            pivot[i] = base[start + i]
            x[0, i] = 0
    for t in range(stored.shape[0]):
        row, out = stored[t, start : start + count], x[begin + t, :count]
        if bits:
            wide = out.view(np.uint32)
            for i in range(count):
                wide[i] = np.uint32(row[i]) << np.uint32(16)
        else:
            for i in range(count):
                out[i] = row[i]
    if not base.size:
        for i in range(count):
            pivot[i] = x[0, i]
        for t in range(stored.shape[0]):
            out = x[t, :count]
            for i in range(count):
                out[i] -= pivot[i]


@compiled
def _centre(x, snapshots, shift, total, part):
    """Centre the first rows of ``x`` [4 k, >= n] in place; fill ``shift``, their mean, ``total``.

    Sums of 16 rows are added to the sum: it errs by some 16 + T / 16 roundings, not by T.
    """
    shift[:] = 0
    total[:] = 0
    for low in range(0, snapshots, 16):
        part[:] = 0
        for t in range(low, min(low + 16, snapshots), 4):
            a, b = x[t, : shift.size], x[t + 1, : shift.size]
            c, d = x[t + 2, : shift.size], x[t + 3, : shift.size]
            for i in range(shift.size):
                part[i] += (a[i] + b[i]) + (c[i] + d[i])
        for i in range(shift.size):
            shift[i] += part[i]
    inverse = 1 / shift.dtype.type(snapshots)
    for i in range(shift.size):
        shift[i] *= inverse
    for t in range(snapshots):
        row = x[t, : shift.size]
        for i in range(shift.size):
            row[i] -= shift[i]
            total[i] += row[i] * row[i]


@compiled
def _products(x, one, two, first, second):
    """Fill ``first`` and ``second`` [n] with the products of ``x`` [4 k, >= n] and two profiles."""
    first[:] = 0
    second[:] = 0
    for t in range(0, x.shape[0], 4):
        a, b = x[t, : first.size], x[t + 1, : first.size]
        c, d = x[t + 2, : first.size], x[t + 3, : first.size]
        a1, b1, c1, d1 = one[t], one[t + 1], one[t + 2], one[t + 3]
        a2, b2, c2, d2 = two[t], two[t + 1], two[t + 2], two[t + 3]
        for i in range(first.size):
            first[i] += (a[i] * a1 + b[i] * b1) + (c[i] * c1 + d[i] * d1)
            second[i] += (a[i] * a2 + b[i] * b2) + (c[i] * c2 + d[i] * d2)


@compiled
def _take(product, candidate, chosen, which):
    """Let ``candidate`` be the mode of weights whose product with it is the largest so far.

    ``which`` holds modes as floats: a loop over values of one width becomes vector instructions.
    """
    for i in range(product.size):
        new, old, mode = product[i], chosen[i], which[i]
        larger = abs(new) > abs(old)
        chosen[i] = new if larger else old
        which[i] = candidate if larger else mode


@compiled
def _fit(
    stored,
    bits,
    base,
    snapshots,
    unit,
    inverse_norm,
    floor,
    width,
    start,
    stop,
    mode,
    scale,
    mean,
    total,
):
    """Fit the weights start..stop; ``unit`` [M', T'] is padded with zeros to even and 4 k."""
    number = mean.dtype
    tile = np.zeros((unit.shape[1], width), dtype=number)
    shift, which = np.empty(width, dtype=number), np.empty(width, dtype=number)
    first, second = np.empty(width, dtype=number), np.empty(width, dtype=number)
    for low in range(start, stop, width):
        high = min(low + width, stop)
        count = high - low
        m, s, w, v = mode[low:high], scale[low:high], mean[low:high], total[low:high]
        _load(stored, bits, base, low, tile, w)
        _centre(tile, snapshots, shift[:count], v, first[:count])
        which[:] = 0
        s[:] = 0
        for k in range(0, unit.shape[0], 2):
            _products(tile, unit[k], unit[k + 1], first[:count], second[:count])
            _take(first[:count], number.type(k), s, which)
            _take(second[:count], number.type(k + 1), s, which)
        for i in range(count):
            w[i] += shift[i]
            constant = v[i] <= w[i] * w[i] * floor
            m[i] = np.uint8(0) if constant else np.uint8(which[i])
            s[i] = s[i] * inverse_norm[m[i]]
            s[i] = s[i] * number.type(0) if constant else s[i]


def assign_and_fit(
    trajectory: Tensor, profiles: Tensor, base: Tensor | None, out: tuple[Tensor, ...]
) -> None:
    """Fill ``out`` = (mode, scale, mean, total); see :func:`cmd_plugin.kernels.assign_and_fit`."""
    stored, numel = trajectory.shape
    snapshots = stored + (base is not None)
    mode, scale, mean, total = (tensor.numpy() for tensor in out)
    roundoff = UNIT_ROUNDOFF[trajectory.dtype if base is None else base.dtype]
    reference = profiles.double().cpu()
    reference = reference - reference.mean(dim=1, keepdim=True)
    norm = reference.norm(dim=1, keepdim=True)
    modes = len(norm)
    unit = torch.zeros(modes + modes % 2, snapshots + -snapshots % 4, dtype=torch.float64)
    unit[:modes, :snapshots] = reference / norm
    bits = trajectory.dtype == torch.bfloat16
    rows = trajectory.view(torch.int16).numpy().view(np.uint16) if bits else trajectory.numpy()
    number = mean.dtype.type
    width = max(64, _TILE // (unit.shape[1] * mean.itemsize) // 16 * 16)
    arguments = (
        rows,
        bits,
        nothing(out[2]) if base is None else base.numpy(),
        snapshots,
        unit.to(out[2].dtype).numpy(),
        (1.0 / norm[:, 0]).to(out[2].dtype).numpy(),
        number(snapshots * (4 * roundoff) ** 2),
        width,
    )

    def run(at: slice) -> None:
        _fit(*arguments, at.start, at.stop, mode, scale, mean, total)

    in_threads(run, shares(numel), numel)
