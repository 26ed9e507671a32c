"""Four launches that take a snapshot in, or refuse it, without asking the host.

The host never learns in between whether weights are finite: the second launch decides, the third
and fourth do nothing where it refused. All numbers of the modes are float64. Sums over blocks are
taken by one program in the order of the blocks: the result is the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._triton import (
    TYPES,
    aligned,
    launch,
    launch_blocks,
    read_record,
    strided,
)
from cmd_plugin.kernels.flat_view import FlatView
from cmd_plugin.kernels.pointer_table import PointerTable
from cmd_plugin.kernels.update_affine._triton import TABLE as _TABLE
from cmd_plugin.kernels.update_affine._triton import launch_updates
from cmd_plugin.kernels.update_affine.follower import HEADER

__all__ = ["GROUP", "Scratch", "follow", "sum_of_squares"]

GROUP = 8  # blocks a program checks
_LEAST = 256  # modes a launch has room for: of fewer, nothing is compiled anew
_WIDE = 2048  # numbers a step of a sum over blocks
_PAIRS = 1024  # (weight, mode) pairs a step of the sum over what makes the profiles

COUNT: tl.constexpr = tl.constexpr(0)
SUM: tl.constexpr = tl.constexpr(1)
SEEN: tl.constexpr = tl.constexpr(2)
REFUSED: tl.constexpr = tl.constexpr(3)
LIMIT: tl.constexpr = tl.constexpr(1)  # of the settings: the decay comes first
FAR: tl.constexpr = tl.constexpr(2)
STILL: tl.constexpr = tl.constexpr(3)
HEAD: tl.constexpr = tl.constexpr(HEADER)
TABLE: tl.constexpr = tl.constexpr(_TABLE.value)
LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float64).max)
EXPONENT: tl.constexpr = tl.constexpr(52)  # bits below the exponent of a float64


@triton.jit
def _read(records, shapes, number, WEIGHT: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """Return (weights of a block, in the state's dtype and zero where there are none; position)."""
    pointer, inside, start, count, kind = read_record(records, number, WEIGHT)
    lane = tl.arange(0, BLOCK)
    if kind == 1:
        pointer, inside, _ = aligned(pointer, inside, start)
        w = tl.load(pointer + inside + lane).to(STATE)
    else:
        w = tl.load(pointer + strided(shapes, kind, inside + lane), lane < count, 0.0).to(STATE)
    return w, start


@triton.jit
def _check(
    records,
    shapes,
    programs,
    state,
    partial,
    faults,
    settings,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the squares of the weights; count those that are not finite, and find the first."""
    if tl.load(state + REFUSED) == 0.0:
        first = tl.program_id(0).to(tl.int64) * GROUP
        count = tl.minimum(programs - first, GROUP)
        squares = tl.zeros([BLOCK], STATE)
        for number in range(count):
            w, _ = _read(records, shapes, first + number, WEIGHT, STATE, BLOCK)
            squares += w * w
        squared = tl.sum(squares.to(tl.float64))
        tl.store(partial + tl.program_id(0), squared)
        if (squared != squared) | (squared > tl.load(settings + LIMIT)):
            for number in range(count):
                w, start = _read(records, shapes, first + number, WEIGHT, STATE, BLOCK)
                bad = (w - w) != 0.0
                position = start + tl.arange(0, BLOCK).to(tl.int64)
                tl.atomic_add(faults, tl.sum(bad.to(tl.int64)))
                tl.atomic_min(faults + 1, tl.min(tl.where(bad, position, 0x7FFFFFFFFFFFFFFF)))


@triton.jit
def _sum(partial, count, WIDE: tl.constexpr):
    lane = tl.arange(0, WIDE)
    sums = tl.zeros([WIDE], tl.float64)
    for start in range(0, count, WIDE):
        sums += tl.load(partial + start + lane, start + lane < count, 0.0)
    return tl.sum(sums)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 1023) << EXPONENT).to(tl.float64, bitcast=True)


@triton.jit
def _plan(
    state,
    after,
    constants,
    accepted,
    partial,
    parts,
    addresses,
    kinds,
    member_mode,
    member_weight,
    members,
    settings,
    M,
    MODES: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    """Decide whether the snapshot is taken in, and with which gains; write the next state."""
    lane = tl.arange(0, MODES)
    live = lane < M
    squared = _sum(partial, parts, WIDE)
    profile = tl.zeros([MODES], tl.float64)
    for start in range(0, members, CHUNK):
        member = start + tl.arange(0, CHUNK)
        there = member < members
        address = tl.load(addresses + member, there, 0)
        kind = tl.load(kinds + member, there, -1)
        value = tl.load(address.to(tl.pointer_type(tl.float16)), kind == 0, 0.0).to(tl.float64)
        value += tl.load(address.to(tl.pointer_type(tl.bfloat16)), kind == 1, 0.0).to(tl.float64)
        value += tl.load(address.to(tl.pointer_type(tl.float32)), kind == 2, 0.0).to(tl.float64)
        value += tl.load(address.to(tl.pointer_type(tl.float64)), kind == 3, 0.0)
        value *= tl.load(member_weight + member, there, 0.0)
        mine = tl.load(member_mode + member, there, -1)[:, None] == lane[None, :]
        profile += tl.sum(tl.where(mine, value[:, None], 0.0), axis=0)
    table = state + HEAD + lane
    middle = tl.load(table + M, live, 0.0)
    squares = tl.load(table + 2 * M, live, 1.0)
    unit = tl.load(table + 3 * M, live, 1.0)
    keep = tl.load(settings)
    far = tl.load(settings + FAR)
    count = keep * tl.load(state + COUNT) + 1.0
    blend = 1.0 / count
    rest = 1.0 - blend
    step = tl.where(live, profile - middle, 0.0)
    moved = keep * squares + step * step * rest
    unsound = tl.sum((live & ((tl.abs(moved) <= LARGEST) == 0)).to(tl.int32))
    refused = tl.load(state + REFUSED)
    taken = (refused == 0.0) & (squared <= tl.load(settings + LIMIT)) & (unsound == 0)
    # Slopes whose unit has been left far behind are carried to another, a power of two away.
    ratio = moved / unit
    beyond = live & ((ratio * far < 1.0) | (ratio > far)) & (moved > tl.load(settings + STILL))
    exponent = ((ratio.to(tl.int64, bitcast=True) >> EXPONENT) & 0x7FF) - 1022
    exponent = tl.where(beyond, tl.minimum(tl.maximum(exponent, -64), 1000), 0)
    unit_after = unit * _power_of_two(exponent)
    tl.store(accepted, taken.to(tl.float64))
    tl.store(accepted + 1, (tl.sum(beyond.to(tl.int32)) > 0).to(tl.float64))
    tl.store(accepted + 2 + lane, 1.0 / _power_of_two(exponent), live)
    tl.store(constants, blend.to(STATE))
    tl.store(constants + 1, keep.to(STATE))
    tl.store(constants + 2, rest.to(STATE))
    tl.store(constants + TABLE + lane, (step * rest / unit_after).to(STATE), live)
    into = after + HEAD + lane
    tl.store(into, tl.where(taken, profile, tl.load(table, live, 0.0)), live)
    tl.store(into + M, tl.where(taken, middle + step * blend, middle), live)
    tl.store(into + 2 * M, tl.where(taken, moved, squares), live)
    tl.store(into + 3 * M, tl.where(taken, unit_after, unit), live)
    tl.store(after + COUNT, tl.where(taken, count, tl.load(state + COUNT)))
    tl.store(after + SUM, tl.load(state + SUM))
    tl.store(after + SEEN, tl.load(state + SEEN) + taken.to(tl.float64))
    tl.store(after + REFUSED, 1.0 - taken.to(tl.float64))


@triton.jit
def _finish(
    state,
    after,
    accepted,
    squares,
    programs,
    settings,
    references,
    slope,
    mean,
    total,
    M,
    MODES: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
):
    """Put the next state in place, with what the snapshot moved added to its sum of squares.

    The references' own coefficients are kept exact.
    """
    lane = tl.arange(0, MODES)
    live = lane < M
    source = after + HEAD + lane
    middle = tl.load(source + M, live, 0.0)
    moved = tl.load(source + 2 * M, live, 0.0)
    unit = tl.load(source + 3 * M, live, 1.0)
    count = tl.load(after + COUNT)
    summed = tl.load(after + SUM)
    if tl.load(accepted) != 0.0:
        added = _sum(squares, programs, WIDE)
        summed = tl.load(settings) * summed + (1.0 - 1.0 / count) * added
        if references is not None:
            at = tl.load(references + lane, live, 0)
            tl.store(slope + at, (moved / unit).to(STATE), live)
            tl.store(mean + at, middle.to(STATE), live)
            if total is not None:
                tl.store(total + at, moved.to(STATE), live)
    into = state + HEAD + lane
    tl.store(into, tl.load(source, live, 0.0), live)
    tl.store(into + M, middle, live)
    tl.store(into + 2 * M, moved, live)
    tl.store(into + 3 * M, unit, live)
    tl.store(state + COUNT, count)
    tl.store(state + SUM, summed)
    tl.store(state + SEEN, tl.load(after + SEEN))
    tl.store(state + REFUSED, tl.load(after + REFUSED))


class Scratch:
    """What launches write for one another, made once for all snapshots of a network.

    Args:
        table: Where the weights are.
        modes: Number of modes M.
        like: The state of the weights, for its dtype and device.

    Attributes:
        after: [4 + 4 M] float64, the next state, until nobody reads the one before any more.
        checked: For each launch its blocks and where the sums of its groups go.
        sums: [P'] float64, the sums of all groups.
        squares: [P] float64, the sums of e^2 of all blocks.
        accepted: [2 + M] float64: whether the snapshot is taken in, whether slopes are carried to
            another unit, and their factors; ``factors`` is the same without the first number.
        constants: [3 + M] what the update multiplies by.
    """

    def __init__(self, table: PointerTable, modes: int, like: Tensor) -> None:
        parts = [-(-blocks.programs // GROUP) for blocks in table.launches]
        double = {"dtype": torch.float64, "device": like.device}
        self.after = torch.empty(HEADER + 4 * modes, **double)  # type: ignore[call-overload]
        self.sums = torch.empty(sum(parts), **double)  # type: ignore[call-overload]
        self.squares = torch.empty(table.programs, **double)  # type: ignore[call-overload]
        self.accepted = torch.empty(2 + modes, **double)  # type: ignore[call-overload]
        self.factors = self.accepted[1:]
        self.constants = torch.empty(_TABLE.value + modes, dtype=like.dtype, device=like.device)
        self.checked = list(zip(table.launches, torch.split(self.sums, parts), strict=True))


def check(scratch: Scratch, state: Tensor, faults: Tensor, settings: Tensor, like: Tensor) -> None:
    """Sum the squares of all weights into ``scratch.sums``, in the dtype of ``like``."""
    number = TYPES[like.dtype]
    for blocks, sums in scratch.checked:
        launch_blocks(
            *(_check, blocks, blocks.shapes, blocks.programs, state, sums, faults, settings),
            group=GROUP,
            STATE=number,
            GROUP=GROUP,
        )


def sum_of_squares(weights: FlatView) -> Tensor:
    """Return [] float64 the sum of the squares of the weights, not finite if one is not."""
    like = torch.empty(0, dtype=weights.dtype, device=weights.device)
    state = torch.zeros(HEADER, dtype=torch.float64, device=weights.device)
    scratch = Scratch(weights.pointer_table(), 0, like)
    # The state refuses nothing, and what is counted of a sum that is not finite is not looked at.
    check(scratch, state, state.long(), torch.full_like(state, float("inf")), like)
    squares: Tensor = scratch.sums.sum()
    return squares


def follow(
    table: PointerTable,
    mode: Tensor,
    slope: Tensor,
    mean: Tensor,
    total: Tensor | None,
    state: Tensor,
    members: Sequence[Tensor],
    references: Tensor | None,
    faults: Tensor,
    scratch: Scratch,
    settings: Tensor,
) -> None:
    """See :meth:`cmd_plugin.kernels.update_affine.Follower.follow`."""
    device, after = state.device, scratch.after
    modes = (state.numel() - HEADER) // 4
    width = max(_LEAST, triton.next_power_of_2(modes))
    number = TYPES[mean.dtype]
    accepted, constants, squares = scratch.accepted, scratch.constants, scratch.squares
    check(scratch, state, faults, settings, mean)
    addresses, kinds, member_mode, member_weight = members
    launch(
        *(_plan, 1, device, state, after, constants, accepted, scratch.sums, scratch.sums.numel()),
        *(addresses, kinds, member_mode, member_weight, addresses.numel()),
        *(settings, modes),
        MODES=width,
        CHUNK=_PAIRS // width,
        WIDE=_WIDE,
        STATE=number,
        enable_fp_fusion=False,
    )
    launch_updates(table, mode, slope, mean, total, constants, squares, scratch.factors, accepted)
    launch(
        *(
            _finish,
            1,
            device,
            state,
            after,
            accepted,
            squares,
            table.programs,
            settings,
        ),
        *(references, slope, mean, total, modes),
        MODES=width,
        WIDE=_WIDE,
        STATE=number,
        enable_fp_fusion=False,
    )
