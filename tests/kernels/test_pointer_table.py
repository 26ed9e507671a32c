"""The table of addresses, and positions that 32 bits cannot hold."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

from cmd_plugin.kernels import FlatView, reconstruct_into
from cmd_plugin.kernels.pointer_table import BLOCK, Launch, PointerTable


@pytest.mark.paths
def test_records_cover_every_weight_once() -> None:
    tensors = [
        torch.zeros(2 * BLOCK + 5),
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(3, 4).T,
        torch.zeros(BLOCK, dtype=torch.bfloat16),
    ]
    table = PointerTable(tensors)
    dtypes = [launch.dtype for launch in table.launches]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
    assert table.programs == 6
    floats, stepped, halves = (launch.records for launch in table.launches)
    start = tensors[0].data_ptr()
    assert floats[:3, 0].tolist() == [start] * 3
    assert floats[:3, 1].tolist() == [0, BLOCK, 2 * BLOCK]
    assert floats[:, 2].tolist() == [0, BLOCK, 2 * BLOCK, 2 * BLOCK + 5]
    assert floats[:, 3].tolist() == [BLOCK, BLOCK, 5, 1]
    assert floats[:, 4].tolist() == [int(start % 16 == 0)] * 2 + [0, 0]
    assert stepped[:, 1:].tolist() == [[0, 2 * BLOCK + 6, 12, 2]]
    shapes = [launch.shapes for launch in table.launches]
    assert shapes[0] is shapes[2] is None
    assert shapes[1] is not None
    assert shapes[1].tolist() == [[1, 1, 4, 3, 0, 0, 0, 1, 4]]
    assert halves[:, 2:].tolist() == [[2 * BLOCK + 18, BLOCK, 0]]  # 16 does not divide its place


@pytest.mark.paths
def test_only_whole_blocks_at_aligned_places_are_read_without_masks() -> None:
    room = torch.zeros(3 * BLOCK + 64)
    assert room.data_ptr() % 16 == 0
    assert PointerTable([room[: 2 * BLOCK]]).launches[0].records[:, 4].tolist() == [1, 1]
    assert not PointerTable([room[1 : 2 * BLOCK]]).launches[0].records[:, 4].any()
    shifted = PointerTable([room[:5], room[8 : 8 + BLOCK]]).launches[0].records
    assert not shifted[:, 4].any()


@pytest.mark.paths
def test_tables_of_equal_shapes_have_equal_launches() -> None:
    """Whatever is strided in one of both is described by strides in both."""
    deep = torch.zeros(1, 2, 1, 3, 1, 2)
    weights = FlatView([torch.zeros(3, 4).T, torch.zeros(7), deep])
    backup = FlatView([torch.zeros(4, 3), torch.zeros(14)[::2], deep.clone()])
    tables = weights.pointer_table(backup), backup.pointer_table(weights)
    for ours, theirs in zip(*(table.launches for table in tables), strict=True):
        assert torch.equal(ours.records[:, 1:], theirs.records[:, 1:])
        assert (ours.shapes is None) == (theirs.shapes is None)
    assert weights.pointer_table(weights) is weights.pointer_table()


@pytest.mark.paths
def test_what_no_record_can_describe() -> None:
    deep = torch.zeros(2, 1, 2, 1, 2, 2)
    assert PointerTable.addressable(deep)
    assert not PointerTable.addressable(deep.permute(5, 4, 3, 2, 1, 0))
    assert not FlatView([deep.permute(5, 4, 3, 2, 1, 0)]).addressable


def sparse(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched."""
    size = numel * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)).view(dtype)


@pytest.mark.paths("triton")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_positions_beyond_2_to_the_31() -> None:
    """One block, at the end of a state of more than 2^31 weights: memory is touched there only."""
    from cmd_plugin.kernels.reconstruct import _triton

    numel, count = 2**31 + 2000, 700
    start = numel - count
    mode, slope, mean = sparse(numel, torch.uint8), *(sparse(numel, torch.float32) for _ in "ab")
    generator = torch.Generator().manual_seed(0)
    mode[start:] = torch.randint(3, (count,), generator=generator).to(torch.uint8)
    slope[start:] = torch.randn(count, generator=generator)
    mean[start:] = torch.randn(count, generator=generator)
    step = torch.randn(3, generator=generator, dtype=torch.float64)
    weights, expected = torch.zeros(count), torch.zeros(count)

    class AtTheEnd(FlatView):
        def pointer_table(self, beside: FlatView | None = None) -> PointerTable:  # noqa: ARG002
            table = PointerTable(self.tensors)
            records = table.launches[0].records
            records[:, 2] += start
            table.launches = [Launch(torch.float32, records, table.launches[0].shapes)]
            return table

    _triton.reconstruct(AtTheEnd([weights]), mode, slope, mean, step, None, None)
    end = (array[start:].clone() for array in (mode, slope, mean))
    reconstruct_into([expected], *end, step)
    assert torch.equal(weights, expected)
    assert weights.any()
