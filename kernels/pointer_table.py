"""Where every block of a list of tensors lies in memory, so that one launch reaches all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "RECORD", "STRIDED", "Launch", "PointerTable"]

BLOCK = 1024  # weights a program handles
RECORD = 5  # int64 numbers of a record, see PointerTable
STRIDED = 9  # int64 numbers that describe a tensor that is not contiguous
_DIMENSIONS = 5
_ALIGNMENT = 16  # bytes of an address, and values of a position, that let 16-byte loads be used


class Launch(NamedTuple):
    """All blocks of the tensors of one dtype.

    Attributes:
        dtype: Their dtype.
        records: [P, 5] int64 on the tensors' device, see :class:`PointerTable`.
        shapes: [S, 9] int64 on the tensors' device.
    """

    dtype: torch.dtype
    records: Tensor
    shapes: Tensor

    @property
    def programs(self) -> int:
        """Number P of blocks, one program each."""
        return self.records.shape[0]


class PointerTable:
    """Addresses of the blocks of tensors that stay where they are, one launch per dtype.

    A record is (address of the tensor, first value of the block inside the tensor, its position in
    the flat vector, number of values, kind). Kind 1 is a whole block at aligned places, which is
    read without masks; 0 is any other part of a contiguous tensor; kind 2 + s is a part of strided
    tensor s, described by its last four sizes and its five strides, in values. All are int64, so
    the flat vector may be longer than 2^31. 40 bytes describe 1024 weights.

    Args:
        tensors: Tensors on one device, each :meth:`addressable`. The table is good as long as they
            stay where they are.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        parts: dict[torch.dtype, list[Tensor]] = {}
        shapes: dict[torch.dtype, list[list[int]]] = {}
        position = 0
        for tensor in tensors:
            if tensor.numel():
                strided = shapes.setdefault(tensor.dtype, [])
                part = _records(tensor, position, len(strided))
                if not tensor.is_contiguous():
                    strided.append(_shape(tensor))
                parts.setdefault(tensor.dtype, []).append(part)
            position += tensor.numel()
        self.launches = [
            Launch(
                dtype,
                torch.cat(records).to(device),
                torch.tensor(shapes[dtype] or [[0] * STRIDED], dtype=torch.int64).to(device),
            )
            for dtype, records in parts.items()
        ]

    @staticmethod
    def addressable(tensor: Tensor) -> bool:
        """Whether a record can describe a tensor: contiguous, or of at most five dimensions."""
        return tensor.is_contiguous() or tensor.ndim <= _DIMENSIONS

    @property
    def programs(self) -> int:
        """Number of blocks of all launches."""
        return sum(launch.programs for launch in self.launches)


def _records(tensor: Tensor, position: int, strided: int) -> Tensor:
    """Return the records [P, 5] of one tensor."""
    first = torch.arange(0, tensor.numel(), BLOCK, dtype=torch.int64)
    records = torch.empty(len(first), RECORD, dtype=torch.int64)
    records[:, 0] = tensor.data_ptr()
    records[:, 1] = first
    records[:, 2] = first + position
    records[:, 3] = (tensor.numel() - first).clamp_(max=BLOCK)
    if tensor.is_contiguous():
        aligned = tensor.data_ptr() % _ALIGNMENT == 0 and position % _ALIGNMENT == 0
        records[:, 4] = (records[:, 3] == BLOCK) & aligned
    else:
        records[:, 4] = 2 + strided
    return records


def _shape(tensor: Tensor) -> list[int]:
    """Return the last four sizes and the five strides of a tensor, padded in front."""
    missing = _DIMENSIONS - tensor.ndim
    sizes = [1] * missing + list(tensor.shape)
    return sizes[1:] + [0] * missing + list(tensor.stride())
