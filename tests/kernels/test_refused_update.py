"""`update_affine` with weights that are not finite: nothing is taken in, whatever the size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.kernels import FlatView, update_affine
from cmd_plugin.kernels.update_affine import reference
from cmd_plugin.kernels.update_affine._revert import CHECKED_FIRST

SMALL, LARGE = 1001, CHECKED_FIRST + 1001
UNIT = 2.0**-24


def state(numel: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return gains [3] and a state of ``numel`` weights."""
    generator = torch.Generator().manual_seed(0)
    arrays = {
        "mode": torch.randint(0, 3, (numel,), generator=generator, dtype=torch.uint8),
        "slope": torch.randn(numel, generator=generator),
        "mean": torch.randn(numel, generator=generator),
        "total": torch.rand(numel, generator=generator),
    }
    return torch.randn(3, generator=generator, dtype=torch.float64), arrays


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.paths("torch", "numba", "triton")
def test_short_vectors_keep_every_bit(path: str, bad: float) -> None:
    gain, arrays = state(SMALL)
    weights = torch.randn(SMALL)
    weights[500] = bad
    before = {name: array.clone() for name, array in arrays.items()}
    squares = update_affine(
        FlatView([weights[:300], weights[300:]]),
        *(arrays[name] for name in ("mode", "slope", "mean")),
        gain,
        0.25,
        total=arrays["total"],
        backend=path,  # type: ignore[arg-type]
    )
    assert not math.isfinite(squares)
    for name, array in arrays.items():
        assert torch.equal(array, before[name]), name


@pytest.mark.parametrize(
    ("numel", "bad"),
    [(LARGE, (math.nan, math.inf, 1e30)), (LARGE, (1e30,) * 3), (SMALL, (1e30, -1e30, 1e35))],
    ids=["not finite", "overflow", "overflow of a few"],
)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.paths("torch", "numba", "triton")
def test_what_is_found_on_the_way_is_taken_back(
    path: str, decay: float, numel: int, bad: tuple[float, ...]
) -> None:
    gain, arrays = state(numel)
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    where = [0, 777, numel - 1]
    weights[where] = torch.tensor(bad)
    before = {name: array.clone() for name, array in arrays.items()}
    blend = 0.25
    squares = update_affine(
        FlatView([weights]),
        *(arrays[name] for name in ("mode", "slope", "mean")),
        gain,
        blend,
        decay,
        arrays["total"],
        backend=path,  # type: ignore[arg-type]
    )
    assert not math.isfinite(squares)
    assert torch.equal(arrays["mode"], before["mode"])
    finite = weights.clone()
    finite[where] = 0.0
    # A handful of roundings each way, of numbers as large as the operands, over 1 - blend.
    step = 16 * UNIT / (1 - blend) * (finite.abs() + before["mean"].abs())
    innovation = finite.abs() + before["mean"].abs()
    largest = float(gain.abs().max())
    bounds = {
        "mean": step,
        "slope": step * largest + 16 * UNIT * (before["slope"].abs() + innovation * largest),
        "total": 4 * step * innovation + 16 * UNIT * (before["total"] + innovation.square()),
    }
    for name, bound in bounds.items():
        error = (arrays[name] - before[name]).abs()
        assert bool((error <= bound / decay).all()), name


def test_the_specification_takes_nothing_in() -> None:
    gain, arrays = state(SMALL)
    weights = torch.randn(SMALL)
    weights[3] = math.nan
    before = {name: array.clone() for name, array in arrays.items()}
    arguments = (arrays["mode"], arrays["slope"], arrays["mean"], gain, 0.25, 0.9, arrays["total"])
    assert not math.isfinite(reference.update_affine(weights, *arguments))
    assert all(torch.equal(array, before[name]) for name, array in arrays.items())
