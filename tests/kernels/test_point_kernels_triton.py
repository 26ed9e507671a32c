"""The Triton paths of the point kernels, interpreted on a CPU, against their specifications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_plugin.kernels import curve_walk, farthest_point_sampling, knn, last_backend
from cmd_plugin.kernels.curve_walk import reference as curve_walk_reference
from cmd_plugin.kernels.farthest_point_sampling import reference as sampling_reference
from cmd_plugin.kernels.knn import reference as knn_reference

pytestmark = pytest.mark.paths("triton")


def clouds(batch: int, size: int, axes: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, axes, generator=generator)


def grid(batch: int, size: int) -> Tensor:
    """Small whole numbers: distances are exact and most of them tie."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 3, (batch, size, 3), generator=generator).float()


@pytest.mark.parametrize("size", [2, 17, 64, 100])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_neighbours_and_their_ties(size: int, exclude_self: bool) -> None:
    k = min(7, size - exclude_self)
    points = grid(2, size)
    result = knn(points, k, exclude_self=exclude_self, backend="triton")
    assert last_backend("knn") == "triton"
    positions, squared = knn_reference.knn(points, points, k, exclude_self)
    assert torch.equal(result.positions, positions)
    assert torch.equal(result.squared, squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("axes", [1, 3, 5])
def test_neighbours_of_other_queries(dtype: torch.dtype, axes: int) -> None:
    points, queries = clouds(2, 33, axes).to(dtype), clouds(2, 9, axes, seed=1).to(dtype)
    strided = points.mT.contiguous().mT
    result = knn(strided, 5, queries, backend="triton")
    exact = knn_reference.knn(points.double(), queries.double(), 5, exclude_self=False)
    # The chosen points are as near as the nearest ones, up to the rounding of `axes` additions.
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    chosen = points.double()[:, None].expand(-1, 9, -1, -1)
    chosen = chosen.gather(2, result.positions[..., None].expand(-1, -1, -1, axes))
    squared = (chosen - queries.double()[:, :, None]).square().sum(dim=3)
    assert ((squared - exact[1]).abs() <= 4 * axes * unit * (1 + exact[1])).all()
    store = torch.finfo(dtype).eps
    assert ((result.squared.double() - exact[1]).abs() <= 4 * axes * store * (1 + exact[1])).all()


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 2), (17, 17), (100, 9), (128, 40)])
def test_farthest_points_and_their_ties(size: int, count: int) -> None:
    for points in (grid(3, size), clouds(3, size), clouds(2, size).double()):
        start = torch.arange(len(points)) % size
        result = farthest_point_sampling(points, count, start, backend="triton")
        assert last_backend("farthest_point_sampling") == "triton"
        assert torch.equal(result, sampling_reference.farthest_point_sampling(points, count, start))


@pytest.mark.parametrize("length", [1, 2, 4, 7, 13])
@pytest.mark.parametrize(("batch", "walks"), [(1, 1), (3, 4), (9, 5)])
def test_walks_are_the_same_to_the_last_bit(length: int, batch: int, walks: int) -> None:
    table = knn(clouds(batch, 30), 6, exclude_self=True).positions
    start = torch.arange(batch * walks).view(batch, walks) % 30
    index = torch.arange(batch) * (2**31 + 5)
    seed = 2**40 + 7
    result = curve_walk(table, start, length, seed=seed, index=index, backend="triton")
    assert last_backend("curve_walk") == "triton"
    expected = curve_walk_reference.curve_walk(table, start, length, seed, index)
    assert torch.equal(result, expected)
