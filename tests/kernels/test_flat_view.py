"""Many tensors as one vector: reading, writing, gathering and putting are exact inverses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels import FlatView
from cmd_plugin.kernels.pointer_table import PointerTable

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of any rank, dtype and memory layout, some of them empty or 0-dim."""
    shapes = draw(
        st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=5)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    made = []
    for shape in shapes:
        tensor = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
        if len(shape) == 4 and draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        elif shape and draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
            tensor = tensor.permute(order)
        if draw(st.booleans()):  # every second entry of a larger tensor
            room = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
            room[..., 1] = tensor
            tensor = room[..., 1]
        made.append(tensor)
    if not any(tensor.numel() for tensor in made):
        made.append(torch.ones(1))
    return made


def flat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.detach().reshape(-1).to(dtype) for part in parts])


def read_all(view: FlatView) -> Tensor:
    scratch = view.scratch()
    return torch.cat([view.read(number, scratch).clone() for number, _, _ in view.blocks()])


@given(tensors(), st.integers(1, 30))
def test_reads_what_concatenation_gives(parts: list[Tensor], half: int) -> None:
    view = FlatView(parts, block=2 * half)
    double = all(part.dtype == torch.float64 for part in parts)
    assert view.dtype == (torch.float64 if double else torch.float32)
    assert view.numel == sum(part.numel() for part in parts)
    assert torch.equal(read_all(view), flat(parts, view.dtype))
    edges = [(start, stop) for _, start, stop in view.blocks()]
    assert edges[0][0] == 0
    assert edges[-1][1] == view.numel
    assert all(stop - start == 2 * half for start, stop in edges[:-1])
    assert all(before[1] == after[0] for before, after in pairwise(edges))


@given(tensors(), st.integers(1, 30), st.integers(0, 10**6))
def test_writes_into_the_tensors_themselves(parts: list[Tensor], half: int, seed: int) -> None:
    view = FlatView(parts, block=2 * half)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(view.numel, generator=generator, dtype=view.dtype)
    pointers = [part.data_ptr() for part in parts]
    for number, start, stop in view.blocks():
        view.write(number, values[start:stop])
    assert [part.data_ptr() for part in parts] == pointers
    at = 0
    for part in parts:
        expected = values[at : at + part.numel()].to(part.dtype)
        assert torch.equal(part.reshape(-1), expected)
        at += part.numel()


@given(tensors(), st.data())
def test_one_block_is_written_and_no_other(parts: list[Tensor], data: st.DataObject) -> None:
    view = FlatView(parts, block=2 * data.draw(st.integers(1, 10)))
    blocks = list(view.blocks())
    number, start, stop = data.draw(st.sampled_from(blocks))
    before = flat(parts, torch.float64)
    view.write(number, torch.full((stop - start,), 0.5, dtype=view.dtype))
    after = flat(parts, torch.float64)
    assert (after[start:stop] == 0.5).all()
    assert torch.equal(after[:start], before[:start])
    assert torch.equal(after[stop:], before[stop:])


@given(tensors(), st.data())
def test_gather_and_put_equal_flat_indexing(parts: list[Tensor], data: st.DataObject) -> None:
    view = FlatView(parts)
    everything = flat(parts, torch.float64)
    where = data.draw(st.lists(st.integers(0, view.numel - 1), max_size=12))
    indices = torch.tensor(where, dtype=torch.int64)
    gathered = view.gather(indices)
    assert gathered.dtype == torch.float64
    assert torch.equal(gathered, everything[indices])

    once = torch.tensor(sorted(set(where)), dtype=torch.int64)
    values = torch.arange(1.0, len(once) + 1, dtype=torch.float64)
    view.put(once, values)
    everything[once] = values
    assert torch.equal(flat(parts, torch.float64), everything)


@given(tensors(), st.data())
def test_counts_and_finds_non_finite_values(parts: list[Tensor], data: st.DataObject) -> None:
    view = FlatView(parts, block=2 * data.draw(st.integers(1, 10)))
    assert view.count_non_finite() == 0
    assert view.first_non_finite() is None
    bad = sorted(data.draw(st.sets(st.integers(0, view.numel - 1), min_size=1, max_size=5)))
    choices = st.sampled_from([math.nan, math.inf, -math.inf])
    values = [data.draw(choices) for _ in bad]
    view.put(torch.tensor(bad), torch.tensor(values, dtype=torch.float64))
    assert view.count_non_finite() == len(bad)
    assert view.first_non_finite() == bad[0]


def test_infinities_that_cancel_are_counted() -> None:
    assert FlatView([torch.tensor([math.inf, -math.inf, 1.0])]).count_non_finite() == 2


def test_a_sum_that_overflows_is_no_infinity() -> None:
    assert FlatView([torch.full((8,), 3e38)]).count_non_finite() == 0


def test_a_contiguous_block_is_a_view_and_costs_no_copy() -> None:
    weights = torch.randn(10)
    view = FlatView([weights], block=4)
    part = view.read(1, view.scratch())
    assert part.data_ptr() == weights[4:].data_ptr()


def test_parameters_are_read_without_a_graph_and_written_in_place() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 3))
    view = FlatView([parameter])
    assert not view.read(0, view.scratch()).requires_grad
    view.write(0, torch.zeros(9))
    assert not parameter.any()
    assert parameter.requires_grad


def test_dtype_can_be_set() -> None:
    view = FlatView([torch.randn(5, dtype=torch.float64)], dtype=torch.float32)
    assert view.scratch().dtype == view.read(0, view.scratch()).dtype == torch.float32


def test_notices_storage_that_moved() -> None:
    parameter = torch.nn.Parameter(torch.randn(4))
    other = torch.randn(2)
    view = FlatView([parameter, other])
    assert view.is_current([parameter, other])
    assert not view.is_current([other, parameter])
    assert not view.is_current([parameter])
    parameter.data = parameter.data.clone()
    assert not view.is_current([parameter, other])


def test_indices_beyond_2_to_24_are_exact() -> None:
    # float32 cannot tell 2^24 + 1 from 2^24; the authors' reference indices went through it.
    weights = torch.zeros(2**24 + 8, dtype=torch.float16)
    view = FlatView([torch.zeros(3), weights])
    at = 3 + 2**24 + torch.tensor([1, 3, 5, 7])
    view.put(at, torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert weights[-8:].tolist() == [0, 1, 0, 3, 0, 5, 0, 7]
    assert view.gather(at).tolist() == [1, 3, 5, 7]
    assert view.gather(at - 1).tolist() == [0, 0, 0, 0]


def test_offsets_beyond_2_to_31() -> None:
    # Two thousand million weights in four bytes.
    huge = torch.full((1,), 0.25).expand(2**31 + 11)
    last = torch.arange(5.0)
    view = FlatView([huge, last])
    assert view.numel == 2**31 + 16
    at = torch.tensor([2**31 + 10, 2**31 + 11, 2**31 + 15])
    assert view.gather(at).tolist() == [0.25, 0.0, 4.0]
    view.put(at[1:], torch.tensor([7.0, 8.0]))
    assert last.tolist() == [7, 1, 2, 3, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one tensor"),
        (([torch.zeros(3, dtype=torch.int64)],), "floating"),
        (([torch.zeros(3), torch.zeros(3, device="meta")],), "one device"),
        (([torch.zeros(3)], 3), "even"),
        (([torch.zeros(3)], 0), "even"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        FlatView(*arguments)


def test_room_for_a_copy_is_one_piece_of_memory_with_the_same_strides() -> None:
    tensors = [
        torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(7),
        torch.randn(3, 4).T,
        torch.randn(5, 6)[:, ::2],
        torch.randn(()),
        torch.zeros(0),
        torch.randn(9).bfloat16(),
    ]
    made = FlatView(tensors).empty_like().tensors
    assert [t.stride() for t in made] == [torch.empty_like(t).stride() for t in tensors]
    assert len({t.untyped_storage().data_ptr() for t in made if t.numel()}) == 2  # of two dtypes
    assert not any(t.data_ptr() % 16 for t in made)
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(made))


def test_later_copies_know_where_they_lie_without_being_asked() -> None:
    tensors = [torch.randn(700, 3), torch.randn(40, 50).T, torch.randn(1030).bfloat16()]
    view = FlatView(tensors)
    assert view.empty_like()._table is None
    view.pointer_table()
    copies = [view.empty_like() for _ in range(3)]  # all of them at once: each has its own memory
    for copy in copies:
        assert copy._table is not None
        for known, found in zip(
            copy._table.launches, PointerTable(copy.tensors).launches, strict=True
        ):
            assert known.dtype == found.dtype
            assert torch.equal(known.records, found.records)
            assert (known.shapes is None) == (found.shapes is None)
