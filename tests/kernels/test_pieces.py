"""The compiled paths walk many tensors by their addresses, at odd places of the flat state too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.kernels import (
    FlatView,
    apply_embedding,
    reconstruct_into,
    snapshot_delta,
    update_affine,
)

pytestmark = pytest.mark.paths("numba")

# Around a span of 128 weights, pairs, and the quarters in which squares are summed.
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 127, 128, 129, 131, 257, 300]), min_size=1)


class Weights:
    """Tensors of some sizes, and a state for them."""

    def __init__(self, sizes: list[int], modes: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(sizes))
        numel = sum(sizes)

        def normal(count: int) -> Tensor:
            return torch.randn(count, generator=generator, dtype=torch.float64)

        self.mode = torch.randint(modes, (numel,), generator=generator).to(torch.uint8)
        self.slope, self.mean, self.total = (normal(numel).to(dtype) for _ in range(3))
        self.flags = torch.rand(numel, generator=generator) < 0.3
        self.table, self.energy = normal(modes), normal(modes).square()
        self.flat = normal(numel).to(dtype)
        self.sizes = sizes

    def view(self) -> FlatView:
        """Return a view of new tensors, each in memory of its own."""
        return FlatView([part.clone() for part in torch.split(self.flat, self.sizes)], block=256)


def apply(w: Weights, backend: str) -> list[Tensor]:
    view = w.view()
    apply_embedding(view, w.flags, w.mode, w.slope, w.mean, w.table, backend)  # type: ignore[arg-type]
    return view.tensors


def model(w: Weights, backend: str) -> list[Tensor]:
    view = w.view()
    reconstruct_into(view, w.mode, w.slope, w.mean, w.table, backend=backend)  # type: ignore[arg-type]
    return view.tensors


def shrunk(w: Weights, backend: str) -> list[Tensor]:
    view = w.view()
    more = {"total": w.total.square(), "energy": w.energy}
    reconstruct_into(view, w.mode, w.slope, w.mean, w.table, **more, backend=backend)  # type: ignore[arg-type]
    return view.tensors


def difference(w: Weights, backend: str) -> list[Tensor]:
    return [snapshot_delta(w.view(), w.mean, backend=backend)]  # type: ignore[arg-type]


@pytest.mark.parametrize("run", [apply, model, shrunk, difference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(sizes=SIZES.filter(any), modes=st.sampled_from([1, 7, 256]))
def test_same_bits_as_pytorch(
    run: Callable[[Weights, str], list[Tensor]], dtype: torch.dtype, sizes: list[int], modes: int
) -> None:
    weights = Weights(sizes, modes, dtype)
    for got, expected in zip(run(weights, "numba"), run(weights, "torch"), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(sizes=SIZES.filter(any), modes=st.sampled_from([1, 7, 256]))
def test_an_update_does_not_depend_on_the_tensors(
    dtype: torch.dtype, sizes: list[int], modes: int
) -> None:
    w = Weights(sizes, modes, dtype)
    results = []
    for view in (w.view(), FlatView([w.flat])):
        state = [array.clone() for array in (w.slope, w.mean, w.total)]
        slope, mean, total = state
        update_affine(view, w.mode, slope, mean, w.table, 0.1, 0.9, total, backend="numba")
        results.append(state)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
