"""Modelled weights in, raw weights back: both exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import BLOCK
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels import FlatView, reconstruct_into, swap_in, swap_out

pytestmark = pytest.mark.paths("torch", "numba", "triton")


def state(numel: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "mode": torch.randint(5, (numel,), generator=generator).to(torch.uint8),
        "slope": torch.randn(numel, generator=generator).to(number),
        "mean": torch.randn(numel, generator=generator).to(number),
        "step": torch.randn(5, generator=generator).double(),
    }


def shrunk(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **arguments,
        "total": 3 * arguments["mean"].square(),
        "energy": arguments["step"].square(),
    }


def bits(tensor: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.reshape(-1).view(kinds[tensor.element_size()])


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("numel", [1, 7, 1001, BLOCK + 3])
@pytest.mark.parametrize("shrink", [False, True])
def test_shows_the_model_and_brings_every_bit_back(
    dtype: torch.dtype, numel: int, shrink: bool
) -> None:
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights.view(kinds[dtype.itemsize])[0] |= (1 << (dtype.itemsize * 8 - 1)) - 1 - 2  # a NaN
    before = weights.clone()
    arguments = state(numel, dtype)
    if shrink:
        arguments = shrunk(arguments)
    view = FlatView([weights])
    backup = view.empty_like()
    swap_in(view, backup, **arguments)
    expected = torch.zeros_like(weights)
    reconstruct_into(FlatView([expected]), **arguments)
    assert torch.equal(weights, expected)
    assert torch.equal(bits(backup.tensors[0]), bits(before))
    swap_out(view, backup)
    assert torch.equal(bits(weights), bits(before))


@given(st.integers(1, 60), st.integers(0, 10**6))
def test_tensors_of_any_kind(numel: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(2, 3, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn((), generator=generator),
        torch.randn(numel, generator=generator).to(torch.bfloat16),
        torch.randn(3, 4, generator=generator).T,
        torch.randn(6, generator=generator).double(),
    ]
    before = [part.clone() for part in parts]
    view = FlatView(parts, dtype=torch.float32)
    arguments = state(view.numel, torch.float32, seed)
    expected = [torch.zeros_like(part) for part in parts]
    reconstruct_into(FlatView(expected, dtype=torch.float32), **arguments)
    backup = view.empty_like()
    swap_in(view, backup, **arguments)
    for part, model in zip(parts, expected, strict=True):
        assert torch.equal(part, model)
    swap_out(view, backup)
    for part, old in zip(parts, before, strict=True):
        assert part.stride() == old.stride()
        assert torch.equal(bits(part), bits(old))


def test_a_backup_may_lie_otherwise() -> None:
    image = torch.randn(2, 3, 4, 5)
    before = image.clone()
    backup = [torch.zeros_like(image).contiguous(memory_format=torch.channels_last)]
    swap_in([image], backup, **state(120, torch.float32))
    assert torch.equal(backup[0], before)
    swap_out([image], backup)
    assert torch.equal(image, before)


@pytest.mark.parametrize("name", ["mode", "slope", "mean", "step", "total", "shape", "dtype"])
def test_bad_arguments_change_nothing(name: str) -> None:
    weights = torch.randn(10)
    before, arguments = weights.clone(), state(10, torch.float32)
    backup = [torch.zeros(10)]
    if name == "shape":
        backup = [torch.zeros(11)]
    elif name == "dtype":
        backup = [torch.zeros(10, dtype=torch.float16)]
    elif name == "total":
        arguments["total"] = torch.ones(10)
    else:
        value = arguments[name]
        arguments[name] = value[:, None] if name == "step" else value[:-1]
    with pytest.raises(ShapeError):
        swap_in([weights], backup, **arguments)
    assert torch.equal(weights, before)
    assert not backup[0].any()
    with pytest.raises(ShapeError, match="backup must have"):
        swap_out([weights], [torch.zeros(2, 5)])
