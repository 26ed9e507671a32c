"""The look-up of pairs equals plain indexing, wherever its arguments lie in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.kernels.mode_table import ModeTable


def at_offset(vector: Tensor, offset: int) -> Tensor:
    """The same values, ``offset`` elements into a larger storage."""
    room = torch.zeros(vector.numel() + offset + 3, dtype=vector.dtype)
    room[offset : offset + vector.numel()] = vector
    return room[offset : offset + vector.numel()]


@pytest.mark.parametrize("modes", [1, 2, 3, 128, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_indexing_for_every_mode(modes: int, dtype: torch.dtype) -> None:
    table = torch.randn(modes, dtype=dtype)
    # All pairs (low, high), so every entry of the table of pairs that can be read is read.
    mode = torch.cartesian_prod(torch.arange(modes), torch.arange(modes)).view(-1)
    mode = mode.to(torch.uint8)
    out = torch.empty(mode.numel(), dtype=dtype)
    result = ModeTable(table, mode.numel()).lookup(mode, out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, table[mode.long()])


@given(
    st.integers(1, 256),
    st.integers(0, 41),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10**6),
)
def test_any_count_and_offset(
    modes: int, count: int, mode_offset: int, out_offset: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(modes, dtype=dtype, generator=generator)
    mode = torch.randint(modes, (count,), generator=generator).to(torch.uint8)
    room = torch.full((count + out_offset + 1,), 7.0, dtype=dtype)
    out = room[out_offset : out_offset + count]
    ModeTable(table, 42).lookup(at_offset(mode, mode_offset), out)
    assert torch.equal(out, table[mode.long()])
    assert (room[:out_offset] == 7).all()  # nothing beside the result is written
    assert (room[out_offset + count :] == 7).all()


def test_storage_that_starts_at_an_odd_address() -> None:
    # A file mapped into memory may start anywhere; its storage offset is 0 all the same.
    mode = torch.frombuffer(bytearray(range(11)), dtype=torch.uint8, offset=1)
    table = torch.arange(11.0)
    out = ModeTable(table, 10).lookup(mode, torch.empty(10))
    assert torch.equal(out, table[1:])


def test_strided_arguments() -> None:
    table = torch.randn(9)
    mode = torch.randint(9, (20,), dtype=torch.uint8)
    out = torch.zeros(10, 2)
    ModeTable(table, 10).lookup(mode[::2], out[:, 1])
    assert torch.equal(out[:, 1], table[mode[::2].long()])
    assert not out[:, 0].any()


def test_table_need_not_be_contiguous() -> None:
    table = torch.randn(6, 2)[:, 0]
    mode = torch.arange(6, dtype=torch.uint8)
    assert torch.equal(ModeTable(table, 6).lookup(mode, torch.empty(6)), table)
