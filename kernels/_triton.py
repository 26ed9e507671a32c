"""What the Triton kernels share: finding a program's weights, and launching.

No kernel here uses shared memory or a tuned table: each streams its operands once, in blocks of
1024 values by eight warps: a thread has four values, 16 bytes of float32, which is one load. (With
four warps it has eight, two loads that each use half of the sectors they fetch.)
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels._dispatch import interpreting
from cmd_plugin.kernels.pointer_table import BLOCK, Launch
from cmd_plugin.kernels.pointer_table import RECORD as _RECORD
from cmd_plugin.kernels.pointer_table import STRIDED as _STRIDED

__all__ = [
    "TYPES",
    "aligned",
    "find_block",
    "launch",
    "launch_blocks",
    "launch_vector",
    "pack",
    "read_record",
    "rounded",
    "strided",
    "vector_block",
]

RECORD: tl.constexpr = tl.constexpr(_RECORD)
STRIDED: tl.constexpr = tl.constexpr(_STRIDED)
INTERPRETED: tl.constexpr = tl.constexpr(interpreting())

WARPS = 8

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def find_block(records, WEIGHT: tl.constexpr):
    """Return what :func:`read_record` returns, of this program's block."""
    return read_record(records, tl.program_id(0).to(tl.int64), WEIGHT)


@triton.jit
def read_record(records, number, WEIGHT: tl.constexpr):
    """Return (pointer to the tensor, first value inside, flat position, count, kind).

    ``number``, of the record, is an int64.
    """
    record = records + RECORD * number
    pointer = tl.load(record).to(tl.pointer_type(WEIGHT))
    return (
        pointer,
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
        tl.load(record + 4),
    )


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Round to nearest even, also where Triton's interpreter cuts bits off (bfloat16)."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x != x, 0x7FC0, upper).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(TYPE)
    return y


@triton.jit
def aligned(pointer, inside, start):
    """Return the same three values in a form that shows the compiler that 16 divides them.

    It then reads and writes 16 bytes at once. (`tl.multiple_of` on a loaded number is lost when
    functions are inlined.)
    """
    address = pointer.to(tl.int64) // 16 * 16
    return tl.multiple_of(address.to(pointer.dtype), 16), inside // 16 * 16, start // 16 * 16


@triton.jit
def strided(shapes, kind, inside):
    """Return where the values ``inside`` a tensor lie, in values from its first one.

    Without ``shapes`` the tensor is contiguous, and no code for strides is compiled.
    """
    where = inside
    if shapes is not None:
        shape = shapes + STRIDED * (kind - 2)
        where = tl.zeros_like(inside)
        rest = inside
        for back in tl.static_range(4):
            size = tl.load(shape + 3 - back)
            where += (rest % size) * tl.load(shape + 8 - back)
            rest = rest // size
        where += rest * tl.load(shape + 4)
    return where


def pack(like: Tensor, *parts: Tensor | float) -> Tensor:
    """Return numbers and tables behind one another, in the dtype and on the device of ``like``.

    One small copy to the device instead of one each, and no rounding of numbers to float32 when the
    state is float64.
    """
    flat = [torch.as_tensor(part, dtype=torch.float64).reshape(-1).cpu() for part in parts]
    return torch.cat(flat).to(like.device, like.dtype)


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Run ``programs`` programs of a kernel on a device."""
    if not programs:
        return
    with nullcontext() if _is_current(device) else torch.cuda.device(device):
        kernel[(programs,)](*arguments, num_warps=WARPS, **options)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def launch_vector(
    kernel: Any, numel: int, block: int, device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Run a kernel over the blocks of a vector, its last parameters (first block, N).

    Whole blocks need no mask, which for lengths that 16 does not divide would keep the compiler
    from reading 16 bytes at once; the rest of the vector is a launch of one program.
    """
    whole = numel // block
    options = {"BLOCK": block, **options}
    launch(kernel, whole, device, *arguments, 0, numel, WHOLE=True, **options)
    if numel % block:
        launch(kernel, 1, device, *arguments, whole, numel, WHOLE=False, **options)


@triton.jit
def vector_block(first, numel, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return (positions, whether they exist) of a program of :func:`launch_vector`."""
    lane = tl.arange(0, BLOCK)
    start = (tl.program_id(0).to(tl.int64) + first) * BLOCK
    ok = lane < BLOCK if WHOLE else start + lane < numel
    return start + lane, ok


def launch_blocks(
    kernel: Any, blocks: Launch, *arguments: Any, group: int = 1, **options: Any
) -> None:
    """Run a kernel over all blocks of a pointer table, ``group`` of them a program."""
    options = {"WEIGHT": TYPES[blocks.dtype], "BLOCK": BLOCK, **options}
    programs = -(-blocks.programs // group)
    launch(kernel, programs, blocks.records.device, blocks.records, *arguments, **options)
