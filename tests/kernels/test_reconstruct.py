"""Modelled weights from the state, into a vector or into the tensors themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import BLOCK
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels import FlatView, reconstruct, reconstruct_into
from cmd_plugin.kernels.reconstruct import reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")


def state(
    numel: int, modes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    return {
        "mode": torch.randint(modes, (numel,), generator=generator).to(torch.uint8),
        "slope": normal(numel).to(dtype),
        "mean": normal(numel).to(dtype),
        "step": normal(modes),
        "total": 3 * normal(numel).square().to(dtype),
        "energy": normal(modes).square(),
    }


def without_shrinking(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: arguments[name] for name in ("mode", "slope", "mean", "step")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1, 2, 7, BLOCK + 3])
@pytest.mark.parametrize("modes", [1, 256])
@pytest.mark.parametrize("shrink", [False, True])
def test_equals_the_specification(dtype: torch.dtype, numel: int, modes: int, shrink: bool) -> None:
    arguments = state(numel, modes, dtype)
    if not shrink:
        arguments = without_shrinking(arguments)
    exact = reference.reconstruct(
        **{k: v if k == "mode" else v.double() for k, v in arguments.items()}
    )
    result = reconstruct(**arguments)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    index = arguments["mode"].long()
    moved = arguments["slope"].double().abs() * arguments["step"].abs()[index]
    bound = 12 * unit * (moved + arguments["mean"].double().abs())
    assert ((result - exact).abs() <= bound).all()


def test_a_weight_that_never_moved_is_its_mean() -> None:
    arguments = state(4, 2)
    arguments["slope"].zero_()
    arguments["total"].zero_()  # 0 / 0 must not become NaN
    assert torch.equal(reconstruct(**arguments), arguments["mean"])


def test_shrinking_is_clamped() -> None:
    arguments = state(50, 2)
    arguments["total"] = arguments["slope"].square() * 1e-3  # rounding may put rho^2 above 1
    expected = reconstruct(**without_shrinking(arguments))
    arguments["energy"] = torch.ones(2, dtype=torch.float64)
    assert torch.equal(reconstruct(**arguments), expected)


@given(st.integers(1, 60), st.integers(0, 3), st.integers(0, 10**6))
def test_fills_a_vector_at_any_offset(numel: int, offset: int, seed: int) -> None:
    arguments = without_shrinking(state(numel, 7, seed=seed))
    room = torch.full((numel + offset + 1,), 7.0)
    out = room[offset : offset + numel]
    assert reconstruct(**arguments, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, reconstruct(**arguments))
    assert (room[:offset] == 7).all()
    assert room[-1] == 7


def test_fills_a_strided_vector() -> None:
    arguments = without_shrinking(state(9, 3))
    room = torch.zeros(9, 2)
    reconstruct(**arguments, out=room[:, 1])
    assert torch.equal(room[:, 1], reconstruct(**arguments))
    assert not room[:, 0].any()


@given(st.integers(1, 20), st.booleans(), st.integers(0, 10**6))
def test_writes_into_tensors_of_any_kind(half: int, shrink: bool, seed: int) -> None:
    parts = [
        torch.zeros(3, 4),
        torch.zeros(()),
        torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.zeros(5, dtype=torch.bfloat16),
        torch.zeros(4, 3).T,
    ]
    numel = sum(part.numel() for part in parts)
    arguments = state(numel, 5, seed=seed)
    if not shrink:
        arguments = without_shrinking(arguments)
    pointers = [part.data_ptr() for part in parts]
    reconstruct_into(FlatView(parts, block=2 * half), **arguments)
    expected = reconstruct(**arguments)
    at = 0
    for part, pointer in zip(parts, pointers, strict=True):
        assert part.data_ptr() == pointer
        assert torch.equal(part.reshape(-1), expected[at : at + part.numel()].to(part.dtype))
        at += part.numel()


def test_arguments_are_left_as_they_are() -> None:
    arguments = state(100, 3)
    kept = {name: value.clone() for name, value in arguments.items()}
    reconstruct(**arguments)
    for name, value in arguments.items():
        assert torch.equal(value, kept[name])


@pytest.mark.parametrize("name", ["mode", "slope", "total", "step", "energy"])
def test_bad_shapes(name: str) -> None:
    arguments = state(10, 3)
    value = arguments[name]
    arguments[name] = value[:, None] if name in ("step", "energy") else value[:-1]
    with pytest.raises(ShapeError, match=f"{name} must be"):
        reconstruct(**arguments)
    with pytest.raises(ShapeError, match=f"{name} must be"):
        reconstruct_into(FlatView([torch.zeros(10)]), **arguments)


def test_bad_dtypes_and_targets() -> None:
    arguments = without_shrinking(state(10, 3))
    with pytest.raises(ShapeError, match="uint8"):
        reconstruct(**{**arguments, "mode": arguments["mode"].long()})
    with pytest.raises(ShapeError, match="slope must be"):
        reconstruct(**{**arguments, "slope": arguments["slope"].double()})
    for out in (torch.zeros(9), torch.zeros(10, dtype=torch.float64), torch.zeros(10, 1)):
        with pytest.raises(ShapeError, match="out must be"):
            reconstruct(**arguments, out=out)
    for weights in (torch.zeros(9), torch.zeros(11), torch.zeros(10, dtype=torch.float64)):
        with pytest.raises(ShapeError, match="mean must be"):
            reconstruct_into(FlatView([weights]), **arguments)
        assert not weights.any()
    with pytest.raises(ShapeError, match="together or not at all"):
        reconstruct(**arguments, total=torch.ones(10))
