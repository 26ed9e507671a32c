"""Radix selection against a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import BLOCK

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels import select_smallest
from cmd_plugin.kernels.select_smallest import reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 2, 7, 1001, BLOCK - 1, BLOCK + 1])
def test_equals_a_stable_sort(dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    for num in sorted({0, 1, numel // 3, numel - 1, numel, numel + 5}):
        chosen = select_smallest(values, num)
        assert int(chosen.sum()) == min(num, numel)
        assert torch.equal(chosen, reference.select_smallest(values, num)), num


@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 1.0, math.inf]),
        min_size=1,
        max_size=60,
    ),
    st.integers(0, 70),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_ties_signs_and_infinities(numbers: list[float], num: int, dtype: torch.dtype) -> None:
    values = torch.tensor(numbers, dtype=dtype)
    assert torch.equal(select_smallest(values, num), reference.select_smallest(values, num))


def test_ties_go_to_the_first_across_blocks() -> None:
    values = torch.ones(2 * BLOCK + 10)
    values[3] = 0.0
    chosen = select_smallest(values, BLOCK + 8)
    assert chosen[: BLOCK + 8].all()
    assert not chosen[BLOCK + 8 :].any()


def test_neighbouring_floats_are_told_apart() -> None:
    """Values that differ in the last bit alone: every digit of the key has to count."""
    start = torch.tensor(0.1234).view(torch.int32)
    values = (start + torch.randperm(5000, generator=torch.Generator().manual_seed(0)).int()).view(
        torch.float32
    )
    chosen = select_smallest(values, 1234)
    assert torch.equal(chosen, reference.select_smallest(values, 1234))


def test_values_are_only_read() -> None:
    values = torch.randn(1000)
    before = values.clone()
    select_smallest(values, 10)
    assert torch.equal(values, before)


@pytest.mark.parametrize("at", [0, 500, 999])
def test_nan_is_refused(at: int) -> None:
    values = torch.randn(1000)
    values[at] = math.nan
    with pytest.raises(InputError, match="NaN"):
        select_smallest(values, 5)


@pytest.mark.parametrize("num", [-1, 1.5, True])
def test_bad_counts(num: int) -> None:
    with pytest.raises(InputError, match="num must be a whole number"):
        select_smallest(torch.randn(4), num)


@pytest.mark.parametrize("values", [torch.randn(2, 2), torch.arange(3)], ids=["matrix", "integers"])
def test_bad_values(values: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="floating vector"):
        select_smallest(values, 1)
