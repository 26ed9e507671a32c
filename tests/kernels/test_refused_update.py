"""`update_affine` with weights that are not finite: nothing is taken in, whatever the size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmd_plugin.kernels import FlatView, update_affine
from cmd_plugin.kernels.flat_view import _sum_of_squares
from cmd_plugin.kernels.update_affine import accepts, reference

SMALL, LARGE = 1001, (1 << 16) + 1001
LIMIT = (torch.finfo(torch.float32).max * 2.0**-20) ** 0.5  # the norm of what is taken in


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


@pytest.mark.parametrize("numel", [SMALL, LARGE])
@pytest.mark.parametrize(
    "bad",
    [
        *((value,) * 3 for value in (math.nan, math.inf, -math.inf, 1e30, 1.5e19, 3e38)),
        (math.nan, math.inf, 1e30),
        (1e30, -1e30, 1e35),
        (1e15, 1e15, math.nan),
    ],
)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.paths("torch", "numba", "triton")
def test_what_is_refused_leaves_every_bit(
    path: str, decay: float, bad: tuple[float, ...], numel: int
) -> None:
    gain, arrays = state(numel)
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    weights[[0, 777, numel - 1]] = torch.tensor(bad)
    before = {name: array.clone() for name, array in arrays.items()}
    squares = update_affine(
        FlatView([weights[:300], weights[300:]]),
        *(arrays[name] for name in ("mode", "slope", "mean")),
        gain,
        0.25,
        decay,
        arrays["total"],
        backend=path,  # type: ignore[arg-type]
    )
    assert not math.isfinite(squares)
    for name, array in arrays.items():
        assert torch.equal(array, before[name]), name


@pytest.mark.parametrize("numel", [SMALL, LARGE])
@pytest.mark.paths("torch", "numba", "triton")
def test_the_norm_decides_what_is_too_large(path: str, numel: int) -> None:
    for share, taken in ((0.999, True), (1.001, False)):
        every = torch.full((numel,), share * LIMIT / numel**0.5)
        one = torch.zeros(numel)
        one[-5] = share * LIMIT
        for weights in (every, one):
            assert accepts([weights], backend=path) == taken  # type: ignore[arg-type]
            gain, arrays = state(numel)
            squares = update_affine([weights], **arrays, gain=gain, blend=0.5, backend=path)  # type: ignore[arg-type]
            assert bool(squares.isfinite()) == taken
            assert all(bool(array.isfinite().all()) for array in arrays.values())


def test_squares_in_any_precision_and_place() -> None:
    values = torch.randn(3, 5, dtype=torch.float64)
    expected = float(values.square().sum()) + 4.0
    for dtype, precision in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        parts = [values.to(dtype).T, torch.full((4,), -1.0, dtype=dtype)]
        assert FlatView(parts).sum_of_squares() == pytest.approx(expected, rel=precision)
        assert _sum_of_squares(parts) == pytest.approx(expected, rel=precision)  # as on a GPU
    half = torch.full((2,), 300.0, dtype=torch.float16)
    assert _sum_of_squares([half]) == pytest.approx(180000.0)  # more than a float16 holds
    assert not math.isfinite(_sum_of_squares([torch.tensor([1.0, math.nan])]))


def test_the_specification_takes_nothing_in() -> None:
    gain, arrays = state(SMALL)
    weights = torch.randn(SMALL)
    weights[3] = math.nan
    before = {name: array.clone() for name, array in arrays.items()}
    arguments = (arrays["mode"], arrays["slope"], arrays["mean"], gain, 0.25, 0.9, arrays["total"])
    assert not math.isfinite(reference.update_affine(weights, *arguments))
    assert all(torch.equal(array, before[name]) for name, array in arrays.items())
