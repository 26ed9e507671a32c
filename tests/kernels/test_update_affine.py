"""One recursive update of all weights against its specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.kernels import FlatView, update_affine
from cmd_plugin.kernels.update_affine import reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")


def state(
    numel: int, modes: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, mode, slope, mean, total, gain)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    mode = torch.randint(modes, (numel,), generator=generator).to(torch.uint8)
    arrays = [normal(numel).to(dtype) for _ in range(3)]
    return arrays[0], mode, arrays[1], arrays[2], normal(numel).square().to(dtype), normal(modes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1, 2, 7, 1001])
@pytest.mark.parametrize("modes", [1, 2, 256])
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("with_total", [False, True])
def test_equals_the_specification(
    dtype: torch.dtype,
    numel: int,
    modes: int,
    decay: float,
    with_total: bool,
) -> None:
    weights, mode, slope, mean, total, gain = state(numel, modes, dtype)
    exact = [t.clone().double() for t in (slope, mean, total)]
    given_total = total if with_total else None
    squares = update_affine(
        FlatView([weights], block=64),
        mode,
        slope,
        mean,
        gain,
        0.25,
        decay,
        given_total,
    )
    expected = reference.update_affine(
        weights.double(), mode, exact[0], exact[1], gain, 0.25, decay, exact[2]
    )
    unit = torch.finfo(dtype).eps / 2
    size = 1 + weights.double().abs() + exact[1].abs()
    assert ((mean - exact[1]).abs() <= 4 * unit * size).all()
    reach = 1 + gain.abs().max() * size
    assert ((slope - exact[0]).abs() <= 8 * unit * (reach + exact[0].abs())).all()
    if with_total:
        assert ((total - exact[2]).abs() <= 8 * unit * (size.square() + exact[2])).all()
    assert float(squares) == pytest.approx(float(expected), rel=max(64, numel) * unit)


@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 10**6))
def test_blocks_do_not_matter(numel: int, half: int, seed: int) -> None:
    results = []
    for block in (2 * half, 1 << 18):
        weights, mode, slope, mean, total, gain = state(numel, 5, torch.float32, seed)
        cut = numel // 3
        parts = [weights[:cut].view(-1, 1), weights[cut:]] if cut else [weights]
        view = FlatView(parts, block=block)
        update_affine(view, mode, slope, mean, gain, 0.2, 0.8, total)
        results.append((slope, mean, total))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_update_a_float32_state(dtype: torch.dtype) -> None:
    weights, mode, slope, mean, _, gain = state(500, 4, torch.float32)
    half = weights.to(dtype)
    other_slope, other_mean = slope.clone(), mean.clone()
    update_affine(FlatView([half]), mode, slope, mean, gain, 0.5)
    update_affine(FlatView([half.float()]), mode, other_slope, other_mean, gain, 0.5)
    assert torch.equal(slope, other_slope)
    assert torch.equal(mean, other_mean)


def test_strided_and_scalar_tensors() -> None:
    weights, mode, slope, mean, _, gain = state(2 * 3 * 4 * 5 + 1, 4, torch.float32)
    other_slope, other_mean = slope.clone(), mean.clone()
    update_affine(FlatView([weights]), mode, other_slope, other_mean, gain, 0.5)
    image = weights[:-1].view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    update_affine(FlatView([image, weights[-1]], block=14), mode, slope, mean, gain, 0.5)
    assert torch.equal(slope, other_slope)
    assert torch.equal(mean, other_mean)


def test_weights_are_only_read() -> None:
    weights, mode, slope, mean, total, gain = state(100, 4, torch.float32)
    before = weights.clone()
    update_affine(FlatView([weights]), mode, slope, mean, gain, 0.5, 0.9, total)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("name", ["mode", "slope", "mean", "total", "gain", "mode dtype", "dtype"])
def test_bad_arguments(name: str) -> None:
    weights, mode, slope, mean, total, gain = state(10, 3, torch.float32)
    arguments = {"mode": mode, "slope": slope, "mean": mean, "total": total, "gain": gain}
    if name == "mode dtype":
        arguments["mode"] = mode.long()
    elif name == "dtype":
        weights = weights.double()
    elif name == "gain":
        arguments["gain"] = gain[:, None]
    else:
        arguments[name] = arguments[name][:-1]
    kept = {key: value.clone() for key, value in arguments.items()}
    with pytest.raises(ShapeError, match="must be"):
        update_affine(FlatView([weights]), blend=0.5, **arguments)
    for key, value in arguments.items():
        assert torch.equal(value, kept[key])


@pytest.mark.paths("numba")
def test_large_updates_do_not_depend_on_threads() -> None:
    weights, mode, slope, mean, _, gain = state(1_500_000, 10, torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        arrays = slope.clone(), mean.clone()
        view = FlatView([weights[:70_001], weights[70_001:]])
        update_affine(view, mode, *arrays, gain, 0.1, backend="numba")
        results.append(arrays)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.paths("numba")
def test_compiled_path_says_what_it_cannot_address() -> None:
    weights, mode, slope, mean, _, gain = state(6, 2, torch.float32)
    strided = FlatView([weights.view(2, 3).T])
    with pytest.raises(InputError, match="contiguous"):
        update_affine(strided, mode, slope, mean, gain, 0.1, backend="numba")
