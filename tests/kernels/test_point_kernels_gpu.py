"""The Triton paths of the point kernels on a CUDA device, at real sizes, against the CPU paths."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.kernels import curve_walk, farthest_point_sampling, knn, last_backend

pytestmark = [
    pytest.mark.paths(),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def grid(batch: int, size: int) -> torch.Tensor:
    """Whole numbers: distances are exact in float32, and many of them tie."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-50, 50, (batch, size, 3), generator=generator).float()


@pytest.mark.parametrize("size", [64, 1000, 1024, 5000])
def test_neighbours(size: int) -> None:
    points = grid(3, size)
    result = knn(points.cuda(), 20, exclude_self=True)
    assert last_backend("knn") == "triton"
    expected = knn(points, 20, exclude_self=True)
    assert torch.equal(result.positions.cpu(), expected.positions)
    assert torch.equal(result.squared.cpu(), expected.squared)


@pytest.mark.parametrize("size", [64, 1000, 1024, 16384])
def test_farthest_points(size: int) -> None:
    points = grid(3, size)
    result = farthest_point_sampling(points.cuda(), 60)
    assert last_backend("farthest_point_sampling") == "triton"
    assert torch.equal(result.cpu(), farthest_point_sampling(points, 60, backend="torch"))


def test_walks() -> None:
    points = grid(64, 1024)
    table = knn(points, 19, exclude_self=True).positions
    start = farthest_point_sampling(points, 4, backend="torch")
    result = curve_walk(table.cuda(), start.cuda(), 512, seed=2**40)
    assert last_backend("curve_walk") == "triton"
    assert torch.equal(result.cpu(), curve_walk(table, start, 512, seed=2**40))
