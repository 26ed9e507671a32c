"""What the Triton kernels share: finding a program's weights, and launching.

No kernel here uses shared memory or a tuned table: each streams its operands once, in blocks of
1024 values by four warps, a configuration that fits every GPU Triton supports.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmd_plugin.kernels.pointer_table import BLOCK, Launch
from cmd_plugin.kernels.pointer_table import RECORD as _RECORD
from cmd_plugin.kernels.pointer_table import STRIDED as _STRIDED

__all__ = ["RECORD", "aligned", "find_block", "launch", "launch_blocks", "pack", "strided"]

RECORD: tl.constexpr = tl.constexpr(_RECORD)
STRIDED: tl.constexpr = tl.constexpr(_STRIDED)

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def find_block(records, WEIGHT: tl.constexpr):
    """Return (pointer to the tensor, first value inside, flat position, count, kind)."""
    record = records + RECORD * tl.program_id(0).to(tl.int64)
    pointer = tl.load(record).to(tl.pointer_type(WEIGHT))
    return (
        pointer,
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
        tl.load(record + 4),
    )


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
    """Return where the values ``inside`` a tensor lie, in values from its first one."""
    where = inside
    if kind >= 2:
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
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, num_warps=4, **options)


def launch_blocks(kernel: Any, blocks: Launch, *arguments: Any, **options: Any) -> None:
    """Run a kernel over all blocks of a pointer table."""
    options = {"WEIGHT": _TYPES[blocks.dtype], "BLOCK": BLOCK, **options}
    launch(kernel, blocks.programs, blocks.records.device, blocks.records, *arguments, **options)
