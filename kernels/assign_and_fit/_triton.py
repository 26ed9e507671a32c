"""Triton path of ``assign_and_fit``: one pass, T values read and 13 bytes written a weight.

A program holds 512 weights. It walks over their T snapshots once for the mean and once more for
every four modes; after the first walk they are in the cache. All sums stay in registers, one weight
to a lane, so there is no shared memory, no barrier, and neither T nor M is padded or compiled in.
Products are IEEE multiply-adds in the dtype of the result, never TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import launch_vector, pack, vector_block
from cmd_plugin.kernels.assign_and_fit.reference import UNIT_ROUNDOFF

__all__ = ["assign_and_fit"]

_BLOCK = 512
_GROUP = 4  # modes whose products are summed in one walk


@triton.jit
def _take(product, candidate, best, scale, which):
    size = tl.abs(product)
    larger = size > best
    return (
        tl.where(larger, size, best),
        tl.where(larger, product, scale),
        tl.where(larger, candidate, which),
    )


@triton.jit
def _fit(
    trajectory,
    base,
    unit,
    inverse_norm,
    floor,
    mode,
    scale,
    mean,
    total,
    stored,
    modes,
    padded,
    row,
    column,
    first_block,
    numel,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, ok = vector_block(first_block, numel, WHOLE, BLOCK)
    number = mean.dtype.element_ty
    first = trajectory + at * column
    if base is not None:
        pivot = tl.load(base + at, ok, 0.0).to(number)
        snapshots = stored + 1
    else:
        pivot = tl.load(first, ok, 0.0).to(number)
        snapshots = stored

    shift = tl.zeros([BLOCK], dtype=number)
    rows = first
    # Sums of 16 rows are added to the sum: it errs by some 16 + T / 16 roundings, not by T.
    for low in range(0, stored, 16):
        part = tl.zeros([BLOCK], dtype=number)
        for _ in tl.range(tl.minimum(stored - low, 16), loop_unroll_factor=4):
            x = tl.load(rows, ok, 0.0).to(number)
            if base is None:
                x -= pivot
            part += x
            rows += row
        shift += part
    shift = shift / snapshots

    best = tl.full([BLOCK], -1.0, dtype=number)
    chosen = tl.zeros([BLOCK], dtype=number)
    which = tl.zeros([BLOCK], dtype=tl.int32)
    squares = tl.zeros([BLOCK], dtype=number)
    for group in range(0, modes, 4):
        column_of_unit = unit + group
        squares = tl.zeros([BLOCK], dtype=number)
        p0 = tl.zeros([BLOCK], dtype=number)
        p1 = tl.zeros([BLOCK], dtype=number)
        p2 = tl.zeros([BLOCK], dtype=number)
        p3 = tl.zeros([BLOCK], dtype=number)
        if base is not None:  # the first snapshot differs from itself by nothing
            x = -shift
            squares += x * x
            p0 += x * tl.load(column_of_unit)
            p1 += x * tl.load(column_of_unit + 1)
            p2 += x * tl.load(column_of_unit + 2)
            p3 += x * tl.load(column_of_unit + 3)
            column_of_unit += padded
        rows = first
        for _ in tl.range(stored, loop_unroll_factor=4):
            x = tl.load(rows, ok, 0.0).to(number)
            if base is None:
                x -= pivot
            x -= shift
            squares += x * x
            p0 += x * tl.load(column_of_unit)
            p1 += x * tl.load(column_of_unit + 1)
            p2 += x * tl.load(column_of_unit + 2)
            p3 += x * tl.load(column_of_unit + 3)
            rows += row
            column_of_unit += padded
        best, chosen, which = _take(p0, group, best, chosen, which)
        best, chosen, which = _take(p1, group + 1, best, chosen, which)
        best, chosen, which = _take(p2, group + 2, best, chosen, which)
        best, chosen, which = _take(p3, group + 3, best, chosen, which)

    middle = pivot + shift
    still = squares <= middle * middle * tl.load(floor)
    which = tl.where(still, 0, which)
    slope = tl.where(still, 0.0, chosen * tl.load(inverse_norm + which))
    tl.store(mode + at, which.to(tl.uint8), ok)
    tl.store(scale + at, slope, ok)
    tl.store(mean + at, middle, ok)
    tl.store(total + at, squares, ok)


def assign_and_fit(
    trajectory: Tensor, profiles: Tensor, base: Tensor | None, out: tuple[Tensor, ...]
) -> None:
    """Fill ``out`` = (mode, scale, mean, total); see :func:`cmd_plugin.kernels.assign_and_fit`."""
    mode, scale, mean, total = out
    stored, numel = trajectory.shape
    snapshots = stored + (base is not None)
    roundoff = UNIT_ROUNDOFF[trajectory.dtype if base is None else base.dtype]
    reference = profiles.double().cpu()
    reference = reference - reference.mean(dim=1, keepdim=True)
    norm = reference.norm(dim=1, keepdim=True)
    modes = len(norm)
    padded = modes + -modes % _GROUP
    unit = torch.zeros(snapshots, padded, dtype=torch.float64)
    unit[:, :modes] = (reference / norm).T
    tables = pack(mean, unit, snapshots * (4 * roundoff) ** 2, 1.0 / norm)
    launch_vector(
        _fit,
        numel,
        _BLOCK,
        mean.device,
        trajectory,
        None if base is None else base.contiguous(),
        tables[: unit.numel()],
        tables[unit.numel() + 1 :],
        tables[unit.numel() :],
        mode,
        scale,
        mean,
        total,
        stored,
        modes,
        padded,
        trajectory.stride(0),
        trajectory.stride(1),
    )
