"""Nearest neighbours against all distances and a stable sort."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.kernels import knn, last_backend
from cmd_plugin.kernels._dispatch import VARIABLE
from cmd_plugin.kernels.knn import reference

pytestmark = pytest.mark.paths()  # each names the paths it is about itself

Backend = Literal["torch", "scipy"]
BACKENDS: list[Backend] = ["torch", "scipy"]


def clouds(batch: int, size: int, axes: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, size, axes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 19, 200])
@pytest.mark.parametrize("axes", [1, 2, 3, 8])
def test_equals_the_specification(
    backend: Backend, dtype: torch.dtype, size: int, axes: int
) -> None:
    points, queries = clouds(2, size, axes).to(dtype), clouds(2, 7, axes, seed=1).to(dtype)
    for k in {1, min(5, size), size}:
        result = knn(points, k, queries, backend=backend)
        assert last_backend("knn") == backend
        positions, squared = reference.knn(points.double(), queries.double(), k, False)
        assert torch.equal(result.positions, positions)
        assert result.squared.dtype == dtype
        number = torch.finfo(dtype)
        allowed = {
            "rtol": (axes + 2) * number.eps,
            "atol": number.tiny * number.eps,
        }  # atol: subnormal
        assert torch.allclose(result.squared.double(), squared, **allowed)


@given(
    st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=1, max_size=30),
    st.integers(1, 30),
    st.booleans(),
)
def test_equally_far_points_come_in_the_order_of_their_positions(
    rows: list[tuple[int, int]], k: int, exclude_self: bool
) -> None:
    points = torch.tensor(rows, dtype=torch.float32)[None]
    if k > len(rows) - exclude_self:
        return
    positions, squared = reference.knn(points, points, k, exclude_self)
    for backend in BACKENDS:
        result = knn(points, k, exclude_self=exclude_self, backend=backend)
        assert torch.equal(result.positions, positions)
        assert torch.equal(result.squared, squared)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_is_no_neighbour_of_its_own_among_its_duplicates(backend: Backend) -> None:
    points = torch.zeros(1, 50, 3)
    points[0, 40:] = 1.0
    result = knn(points, 5, exclude_self=True, backend=backend).positions[0]
    own = torch.arange(50)[:, None]
    assert not (result == own).any()
    assert result[0].tolist() == [1, 2, 3, 4, 5]
    assert result[3].tolist() == [0, 1, 2, 4, 5]
    assert result[45].tolist() == [40, 41, 42, 43, 44]


def test_many_axes_keep_precision_far_from_the_origin() -> None:
    points = clouds(1, 120, 64).double()
    near = reference.knn(points, points, 6, True)[0]
    moved = knn(points + 1e4, 6, exclude_self=True)
    assert last_backend("knn") == "torch"
    assert torch.equal(moved.positions, near)


def test_rows_in_blocks_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmd_plugin.kernels.knn import _cpu

    points = torch.cat([clouds(1, 40), torch.zeros(1, 20, 3)], dim=1)
    whole = knn(points, 9, exclude_self=True, backend="torch")
    monkeypatch.setattr(_cpu, "_ENTRIES", 7 * 60)
    parts = knn(points, 9, exclude_self=True, backend="torch")
    assert torch.equal(whole.positions, parts.positions)


def test_a_cloud_has_the_same_neighbours_in_any_batch() -> None:
    points = clouds(5, 100)
    whole = knn(points, 8)
    assert torch.equal(knn(points[3:4], 8).positions[0], whole.positions[3])
    empty = knn(points[:0], 8)
    assert empty.positions.shape == (0, 100, 8)


def test_gradients_are_not_needed_and_not_followed() -> None:
    points = clouds(1, 10).requires_grad_()
    assert not knn(points, 2).squared.requires_grad


def test_environment_chooses_for_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    points = clouds(1, 10)
    knn(points, 2)
    assert last_backend("knn") == "scipy"
    monkeypatch.setenv(VARIABLE, "torch")
    knn(points, 2)
    assert last_backend("knn") == "torch"
    knn(points, 2, backend="scipy")
    assert last_backend("knn") == "scipy"
    monkeypatch.setenv(VARIABLE, "numba")  # other kernels have it, this one does not
    knn(points, 2)
    assert last_backend("knn") == "scipy"


def test_bad_input() -> None:
    points = clouds(2, 10)
    for bad in (points[0], points[:, :0], points[:, :, :0]):
        with pytest.raises(ShapeError, match=r"points must be \[B, N, C\]"):
            knn(bad, 1)
    with pytest.raises(ShapeError, match="floating point"):
        knn(points.long(), 1)
    for k in (0, 11, True, 2.0):
        with pytest.raises(ShapeError, match=r"k must be in 1\.\.10"):
            knn(points, k)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"k must be in 1\.\.9"):
        knn(points, 10, exclude_self=True)
    with pytest.raises(ShapeError, match="queries must be"):
        knn(points, 1, points[:1])
    with pytest.raises(InputError, match="give no queries"):
        knn(points, 1, points, exclude_self=True)
    with pytest.raises(InputError, match="not one of auto, torch, triton, scipy"):
        knn(points, 1, backend="numba")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not one of auto, torch, triton"):
        knn(clouds(1, 5, 9), 1, backend="scipy")
    points[0, 3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
        knn(points, 1)


def test_triton_by_name_on_a_cpu_is_refused() -> None:
    points = clouds(1, 4)
    with pytest.raises(InputError, match="runs on CUDA devices"):
        knn(points, 1, backend="triton")
    with pytest.raises(InputError, match="knn takes up to 8192 points and 16 axes there"):
        knn(torch.zeros(1, 8193, 3), 1, backend="triton")
