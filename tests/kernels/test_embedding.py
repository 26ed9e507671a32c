"""Drift, masked overwriting and folded gradients against their specifications."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import BLOCK, INTERPRETING
from torch import Tensor

from cmd_plugin.errors import ShapeError
from cmd_plugin.kernels import FlatView, apply_embedding, coefficient_drift, fold_gradients
from cmd_plugin.kernels.apply_embedding import reference as apply_reference
from cmd_plugin.kernels.coefficient_drift import reference as drift_reference
from cmd_plugin.kernels.fold_gradients import reference as fold_reference

pytestmark = pytest.mark.paths("torch", "numba", "triton")

SIZES = [1, 2, 7, 1001, BLOCK + 3]
STATES = [torch.float32, torch.float64]


def state(
    numel: int, modes: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, embedded, mode, scale, offset, profile)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    embedded = torch.rand(numel, generator=generator) < 0.4
    mode = torch.randint(modes, (numel,), generator=generator).to(torch.uint8)
    weights, scale, offset = (normal(numel).to(dtype) for _ in range(3))
    return weights, embedded, mode, scale, offset, normal(modes)


@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_drift(dtype: torch.dtype, numel: int) -> None:
    arrays = state(numel, 2, dtype)
    a, b, old_a, old_b = arrays[0], arrays[3], arrays[4], torch.zeros(numel, dtype=dtype)
    expected = drift_reference.coefficient_drift(*(x.double() for x in (a, b, old_a, old_b)))
    unit = torch.finfo(dtype).eps / 2
    drift = coefficient_drift(a, b, old_a, old_b)
    # Two subtractions relative to their operands, then squares, a sum and a root.
    reach = a.abs() + b.abs() + old_a.abs()
    assert ((drift - expected).abs() <= 4 * unit * reach.double()).all()
    assert not coefficient_drift(a, b, a, b).any()
    out = old_a.clone()
    assert coefficient_drift(a, b, out, old_b, out=out) is out
    assert torch.equal(out, drift)


@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("modes", [1, 3, 256])
def test_apply(dtype: torch.dtype, numel: int, modes: int) -> None:
    weights, embedded, mode, scale, offset, profile = state(numel, modes, dtype)
    expected = weights.clone()
    apply_reference.apply_embedding(expected, embedded, mode, scale, offset, profile)
    apply_embedding(FlatView([weights]), embedded, mode, scale, offset, profile)
    assert torch.equal(weights, expected)


@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 10**6))
def test_apply_does_not_depend_on_blocks(numel: int, half: int, seed: int) -> None:
    results = []
    for block in (2 * half, BLOCK):
        weights, embedded, mode, scale, offset, profile = state(numel, 5, torch.float32, seed)
        cut = numel // 3
        parts = [weights[:cut].view(-1, 1), weights[cut:]] if cut else [weights]
        apply_embedding(FlatView(parts, block=block), embedded, mode, scale, offset, profile)
        results.append(weights)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_weights_keep_their_bits(dtype: torch.dtype) -> None:
    """Also float64 weights under a float32 state, NaNs and strided tensors."""
    count = 2 * 3 * 4 * 5 + 1
    _, embedded, mode, scale, offset, profile = state(count, 4, torch.float32)
    noise = torch.randn(count, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise[~embedded] *= 1 + 2.0**-40  # lost in float32
    weights = noise.to(dtype)
    weights[int((~embedded).nonzero()[0])] = float("nan")
    image = weights[:-1].view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    last = weights[-1].clone()
    view = FlatView([image, last], block=14, dtype=torch.float32)
    apply_embedding(view, embedded, mode, scale, offset, profile)
    flat = torch.cat([image.reshape(-1), last.view(1)])
    model = (scale * profile.float()[mode.long()] + offset).to(dtype)
    assert torch.equal(flat[embedded], model[embedded])
    bits = torch.int16 if dtype.itemsize == 2 else torch.int64
    assert torch.equal(flat[~embedded].view(bits), weights[~embedded].view(bits))


# Triton's fold walks over its blocks of 256 once for every ten modes, which takes the interpreter
# seconds: there, all modes on one block, on two, and on less.
FOLDS = (
    [*product(SIZES, [1, 3]), *product([1, 7, 256, 257], [256])]
    if INTERPRETING
    else list(product(SIZES, [1, 3, 256]))
)


@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize(("numel", "modes"), FOLDS)
def test_fold(dtype: torch.dtype, numel: int, modes: int) -> None:
    gradient, embedded, mode, scale, *_ = state(numel, modes, dtype)
    other, before = gradient.clone(), gradient.clone()
    expected = fold_reference.fold_gradients(other, embedded, mode, scale, modes)
    sums = fold_gradients(gradient, embedded, mode, scale, modes)
    reach = float((scale * before).double().abs().sum())
    assert sums.shape == (modes,)
    assert ((sums - expected).abs() <= numel * 2.0**-53 * reach).all()
    assert torch.equal(gradient, other)
    assert not gradient[embedded].any()
    assert torch.equal(gradient[~embedded], before[~embedded])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fold_half_precision_gradients(dtype: torch.dtype) -> None:
    gradient, embedded, mode, scale, *_ = state(500, 4, torch.float32)
    half = gradient.to(dtype)
    expected = fold_gradients(half.float(), embedded, mode, scale, 4)
    assert torch.equal(fold_gradients(half, embedded, mode, scale, 4), expected)


@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_fold_adds_up_what_a_program_finds_in_several_blocks(
    dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "triton":  # 7 blocks of 1024 in 2 programs: as 7 million weights in 1024 of them
        module = importlib.import_module("cmd_plugin.kernels.fold_gradients._triton")
        monkeypatch.setattr(module, "_PROGRAMS", 2)
    numel = 6 * 1024 + 11
    gradient, embedded, mode, scale, *_ = state(numel, 5, dtype)
    other, before = gradient.clone(), gradient.clone()
    expected = fold_reference.fold_gradients(other, embedded, mode, scale, 5)
    sums = fold_gradients(gradient, embedded, mode, scale, 5)
    reach = float((scale * before).double().abs().sum())
    assert ((sums - expected).abs() <= numel * 2.0**-53 * reach).all()
    assert torch.equal(gradient, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_fold_leaves_the_bits_of_other_gradients(value: float) -> None:
    gradient, embedded, mode, scale, *_ = state(500, 4, torch.float32)
    gradient[~embedded] = value
    before = gradient.clone()
    fold_gradients(gradient, embedded, mode, scale, 4)
    assert torch.equal(gradient[~embedded].view(torch.int32), before[~embedded].view(torch.int32))
    assert not gradient[embedded].any()


def test_fold_ignores_what_is_not_embedded() -> None:
    gradient, embedded, mode, scale, *_ = state(500, 4, torch.float32)
    spoilt = torch.where(embedded, gradient, float("nan"))
    assert torch.equal(
        fold_gradients(spoilt, embedded, mode, scale, 4),
        fold_gradients(gradient, embedded, mode, scale, 4),
    )


@pytest.mark.parametrize("name", ["embedded", "mode", "scale", "offset", "profile", "dtype"])
def test_bad_arguments_of_apply(name: str) -> None:
    weights, embedded, mode, scale, offset, profile = state(10, 3, torch.float32)
    arguments = {
        "embedded": embedded,
        "mode": mode,
        "scale": scale,
        "offset": offset,
        "profile": profile,
    }
    if name == "dtype":
        arguments["embedded"] = embedded.byte()
    else:
        arguments[name] = arguments[name][:-1] if name != "profile" else profile[:, None]
    before = weights.clone()
    with pytest.raises(ShapeError, match="must be"):
        apply_embedding(FlatView([weights]), **arguments)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("name", ["scale", "offset", "old_scale", "old_offset", "out", "dtype"])
def test_bad_arguments_of_drift(name: str) -> None:
    arguments = {k: torch.randn(10) for k in ("scale", "offset", "old_scale", "old_offset", "out")}
    if name == "dtype":
        arguments["offset"] = arguments["offset"].double()
    elif name == "scale":
        arguments[name] = torch.arange(10)
    else:
        arguments[name] = arguments[name][:-1]
    out = arguments.pop("out")
    with pytest.raises(ShapeError, match="must be"):
        coefficient_drift(**arguments, out=out)


@pytest.mark.parametrize("name", ["gradient", "embedded", "mode", "scale", "integers"])
def test_bad_arguments_of_fold(name: str) -> None:
    gradient, embedded, mode, scale, *_ = state(10, 3, torch.float32)
    arguments = {"gradient": gradient, "embedded": embedded, "mode": mode, "scale": scale}
    if name == "integers":
        arguments["gradient"] = torch.arange(10)
    else:
        arguments[name] = arguments[name][:-1]
    with pytest.raises(ShapeError, match="must be"):
        fold_gradients(**arguments, modes=3)
