"""Where every block of a list of tensors lies in memory, so that one launch reaches all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "RECORD", "STRIDED", "Launch", "PointerTable", "strides_of"]

BLOCK = 1024  # weights a program handles
RECORD = 5  # int64 numbers of a record, see PointerTable
STRIDED = 9  # int64 numbers that describe a tensor that is not contiguous
_DIMENSIONS = 5
_ALIGNMENT = 16  # bytes of an address, and values of a position, that let 16-byte loads be used


_Row = tuple[int, int, int, int]  # of a tensor: address, flat position, number of values, kind


class Launch(NamedTuple):
    """All blocks of the tensors of one dtype that are contiguous, or of those that are not.

    Attributes:
        dtype: Their dtype.
        records: [P, 5] int64 on the tensors' device, see :class:`PointerTable`.
        shapes: [S, 9] int64 on the tensors' device; None if the tensors are contiguous: a kernel
            is compiled without the code for strides then, which needs twice the registers.
    """

    dtype: torch.dtype
    records: Tensor
    shapes: Tensor | None

    @property
    def programs(self) -> int:
        """Number P of blocks, one program each."""
        return self.records.shape[0]


class PointerTable:
    """Addresses of the blocks of tensors that stay where they are, one launch or two per dtype.

    A record is (address of the tensor, first value of the block inside the tensor, its position in
    the flat vector, number of values, kind). Kind 1 is a whole block at aligned places, which is
    read without masks; 0 is any other part of a contiguous tensor; kind 2 + s is a part of strided
    tensor s, described by its last four sizes and its five strides, in values. All are int64, so
    the flat vector may be longer than 2^31. 40 bytes describe 1024 weights.

    Args:
        tensors: Tensors on one device, each :meth:`addressable`. The table is good as long as they
            stay where they are.
        strided: Which of them to describe by strides; those that are not contiguous if None. Two
            tables of the same shapes have the same launches if this is the same.

    Attributes:
        launches: Records of the blocks.
    """

    def __init__(self, tensors: Sequence[Tensor], strided: Sequence[bool] | None = None) -> None:
        strided = strides_of(tensors) if strided is None else strided
        device = tensors[0].device
        rows: dict[tuple[torch.dtype, bool], list[_Row]] = {}
        shapes: dict[torch.dtype, list[list[int]]] = {}
        position = 0
        for tensor, stepped in zip(tensors, strided, strict=True):
            if tensor.numel():
                aligned = not (tensor.data_ptr() % _ALIGNMENT or position % _ALIGNMENT)
                kind = int(aligned)
                if stepped:
                    known = shapes.setdefault(tensor.dtype, [])
                    kind = 2 + len(known)
                    known.append(_shape(tensor))
                row = (tensor.data_ptr(), position, tensor.numel(), kind)
                rows.setdefault((tensor.dtype, stepped), []).append(row)
            position += tensor.numel()
        self.launches = [
            Launch(
                dtype,
                _records(found, device),
                torch.tensor(shapes[dtype], dtype=torch.int64).to(device) if stepped else None,
            )
            for (dtype, stepped), found in rows.items()
        ]

    def moved(self, distances: Mapping[torch.dtype, int]) -> PointerTable:
        """Return the table of tensors that lie as these do, so many bytes further on.

        It is made where it is used, from this one: nothing is copied to the device for it.
        """
        table = PointerTable.__new__(PointerTable)
        table.launches = []
        for launch in self.launches:
            records = launch.records.clone()
            records[:, 0] += distances[launch.dtype]
            table.launches.append(launch._replace(records=records))
        return table

    @staticmethod
    def addressable(tensor: Tensor) -> bool:
        """Whether a record can describe a tensor: contiguous, or of at most five dimensions."""
        return tensor.is_contiguous() or tensor.ndim <= _DIMENSIONS

    @property
    def programs(self) -> int:
        """Number of blocks of all launches."""
        return sum(launch.programs for launch in self.launches)


def strides_of(tensors: Sequence[Tensor]) -> list[bool]:
    """Return which tensors need strides to be described: those that are not contiguous."""
    return [not tensor.is_contiguous() for tensor in tensors]


def _records(rows: list[_Row], device: torch.device) -> Tensor:
    """Return the records [P, 5], made on the device of (address, position, N, kind) a tensor."""
    counts = [-(-numel // BLOCK) for _, _, numel, _ in rows]
    firsts = [0, *accumulate(counts[:-1])]
    table = torch.tensor(
        [(*row, count, first) for row, count, first in zip(rows, counts, firsts, strict=True)],
        dtype=torch.int64,
    ).to(device)
    programs = sum(counts)
    table = table.repeat_interleave(table[:, 4], dim=0, output_size=programs)
    address, position, numel, kind, _, first = table.unbind(1)
    inside = (torch.arange(programs, device=device) - first) * BLOCK
    count = (numel - inside).clamp_(max=BLOCK)
    kind = kind.where((kind != 1) | (count == BLOCK), 0)
    return torch.stack([address, inside, inside + position, count, kind], dim=1)


def _shape(tensor: Tensor) -> list[int]:
    """Return the last four sizes and the five strides of a tensor, padded in front."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)  # it may have more dimensions than five
    missing = _DIMENSIONS - tensor.ndim
    sizes = [1] * missing + list(tensor.shape)
    return sizes[1:] + [0] * missing + list(tensor.stride())
