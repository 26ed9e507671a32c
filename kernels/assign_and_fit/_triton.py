"""Triton path of ``assign_and_fit``: one pass, T values read and 13 bytes written a weight.

A program holds 512 weights. It walks over their T snapshots once for the mean and once more for
every ten modes; after the first walk they are in the cache. All sums stay in registers, one
weight to a lane, so there is no shared memory, no barrier, and neither T nor M is padded or
compiled in. Products are IEEE multiply-adds in the dtype of the result, never TF32.
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
_GROUP = 10  # modes whose products are summed in one walk


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
def _walk(
    trajectory,
    base,
    pivot,
    shift,
    at,
    ok,
    unit,
    group,
    best,
    chosen,
    which,
    stored,
    padded,
    row,
    column,
    SQUARES: tl.constexpr,
):
    """Walk over the snapshots for ten modes; return (best, chosen, which, sum of squares)."""
    squares = tl.zeros_like(shift)
    p0 = tl.zeros_like(shift)
    p1 = tl.zeros_like(shift)
    p2 = tl.zeros_like(shift)
    p3 = tl.zeros_like(shift)
    p4 = tl.zeros_like(shift)
    p5 = tl.zeros_like(shift)
    p6 = tl.zeros_like(shift)
    p7 = tl.zeros_like(shift)
    p8 = tl.zeros_like(shift)
    p9 = tl.zeros_like(shift)
    unit += group
    if base is not None:  # the first snapshot differs from itself by nothing
        x = -shift
        if SQUARES:
            squares += x * x
        p0 += x * tl.load(unit + 0)
        p1 += x * tl.load(unit + 1)
        p2 += x * tl.load(unit + 2)
        p3 += x * tl.load(unit + 3)
        p4 += x * tl.load(unit + 4)
        p5 += x * tl.load(unit + 5)
        p6 += x * tl.load(unit + 6)
        p7 += x * tl.load(unit + 7)
        p8 += x * tl.load(unit + 8)
        p9 += x * tl.load(unit + 9)
        unit += padded
    # One number moves from snapshot to snapshot, not an address for each weight.
    for _ in tl.range(stored, loop_unroll_factor=2):
        x = tl.load(trajectory + at * column, ok, 0.0).to(shift.dtype)
        if base is None:
            x -= pivot
        x -= shift
        if SQUARES:
            squares += x * x
        p0 += x * tl.load(unit + 0)
        p1 += x * tl.load(unit + 1)
        p2 += x * tl.load(unit + 2)
        p3 += x * tl.load(unit + 3)
        p4 += x * tl.load(unit + 4)
        p5 += x * tl.load(unit + 5)
        p6 += x * tl.load(unit + 6)
        p7 += x * tl.load(unit + 7)
        p8 += x * tl.load(unit + 8)
        p9 += x * tl.load(unit + 9)
        trajectory += row
        unit += padded
    best, chosen, which = _take(p0, group + 0, best, chosen, which)
    best, chosen, which = _take(p1, group + 1, best, chosen, which)
    best, chosen, which = _take(p2, group + 2, best, chosen, which)
    best, chosen, which = _take(p3, group + 3, best, chosen, which)
    best, chosen, which = _take(p4, group + 4, best, chosen, which)
    best, chosen, which = _take(p5, group + 5, best, chosen, which)
    best, chosen, which = _take(p6, group + 6, best, chosen, which)
    best, chosen, which = _take(p7, group + 7, best, chosen, which)
    best, chosen, which = _take(p8, group + 8, best, chosen, which)
    best, chosen, which = _take(p9, group + 9, best, chosen, which)
    return best, chosen, which, squares


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
    if base is not None:
        pivot = tl.load(base + at, ok, 0.0).to(number)
        snapshots = stored + 1
    else:
        pivot = tl.load(trajectory + at * column, ok, 0.0).to(number)
        snapshots = stored

    shift = tl.zeros([BLOCK], dtype=number)
    rows = trajectory
    # Sums of 16 rows are added to the sum: it errs by some 16 + T / 16 roundings, not by T.
    for low in range(0, stored, 16):
        part = tl.zeros([BLOCK], dtype=number)
        for _ in tl.range(tl.minimum(stored - low, 16), loop_unroll_factor=2):
            x = tl.load(rows + at * column, ok, 0.0).to(number)
            if base is None:
                x -= pivot
            part += x
            rows += row
        shift += part
    shift = shift / snapshots

    best = tl.full([BLOCK], -1.0, dtype=number)
    chosen = tl.zeros([BLOCK], dtype=number)
    which = tl.zeros([BLOCK], dtype=tl.int32)
    best, chosen, which, squares = _walk(
        trajectory,
        base,
        pivot,
        shift,
        at,
        ok,
        unit,
        0,
        best,
        chosen,
        which,
        stored,
        padded,
        row,
        column,
        SQUARES=True,
    )
    for group in range(10, modes, 10):
        best, chosen, which, _ = _walk(
            trajectory,
            base,
            pivot,
            shift,
            at,
            ok,
            unit,
            group,
            best,
            chosen,
            which,
            stored,
            padded,
            row,
            column,
            SQUARES=False,
        )

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
