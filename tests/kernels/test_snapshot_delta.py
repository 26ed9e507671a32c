"""Differences to the first snapshot, rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import BLOCK
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels import FlatView, snapshot_delta
from cmd_plugin.kernels.snapshot_delta import reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def snapshot(numel: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weights, base): differences of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    base, step, size = torch.randn(3, numel, generator=generator, dtype=torch.float64)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return (base + step * 10 ** (2 * size)).to(dtype), base.to(state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 2, 7, 1001, BLOCK + 3])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_equals_the_specification(dtype: torch.dtype, numel: int, stored: torch.dtype) -> None:
    weights, base = snapshot(numel, dtype)
    out = torch.empty(numel, dtype=stored)
    assert snapshot_delta(FlatView([weights]), base, out=out) is out
    assert torch.equal(out, reference.snapshot_delta(weights, base, stored))
    assert snapshot_delta(FlatView([weights]), None, out=out) is out
    state = weights.to(base.dtype)  # read in the state's dtype, as every kernel reads weights
    assert torch.equal(out, state.to(stored))


def test_makes_bfloat16_by_default() -> None:
    weights, base = snapshot(100, torch.float32)
    delta = snapshot_delta([weights], base)
    assert delta.dtype == torch.bfloat16
    assert torch.equal(delta, (weights - base).bfloat16())


def test_rounds_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    unit = 2.0**-8
    values = [1 + unit, 1 + 3 * unit, 1 + unit * 1.01, -1 - unit, 0.0, -0.0, 1e-40, 3.4e38]
    weights = torch.tensor([*values, float("inf"), -float("inf"), float("nan")])
    delta = snapshot_delta([weights], torch.zeros_like(weights))
    expected = weights.bfloat16()
    assert torch.equal(
        delta[:-1].view(torch.int16), (weights - 0.0).bfloat16()[:-1].view(torch.int16)
    )
    assert torch.equal(delta[:3], expected[:3])
    assert delta[-1].isnan()


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 10**6))
def test_reads_tensors_of_any_kind(numel: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(2, 3, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn((), generator=generator),
        torch.randn(numel, generator=generator).to(torch.bfloat16),
        torch.randn(3, 4, generator=generator).T,
    ]
    flat = torch.cat([part.float().reshape(-1) for part in parts])
    base = torch.randn(len(flat), generator=generator)
    delta = snapshot_delta(FlatView(parts, block=2 * half), base)
    assert torch.equal(delta, (flat - base).bfloat16())


@pytest.mark.parametrize("name", ["base", "base dtype", "out", "out dtype", "strides"])
def test_bad_arguments(name: str) -> None:
    weights, base = snapshot(10, torch.float32)
    out = torch.zeros(10, dtype=torch.bfloat16)
    if name == "base":
        base = base[:-1]
    elif name == "base dtype":
        base = base.double()
    elif name == "out":
        out = out[:-1]
    elif name == "out dtype":
        out = out.long()
    else:
        out = torch.zeros(20)[::2]
    with pytest.raises(ShapeError, match="must be"):
        snapshot_delta([weights], base, out=out)
    assert not out.any()
