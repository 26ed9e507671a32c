"""Every pick is the point farthest from the picks before it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmd_plugin.errors import MissingDependency, NonFiniteError, ShapeError
from cmd_plugin.kernels import _dispatch, farthest_point_sampling, last_backend

pytestmark = pytest.mark.paths()  # each names the paths it is about itself

Backend = Literal["torch", "fpsample"]


@pytest.fixture(params=["torch", "fpsample"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "fpsample":
        pytest.importorskip("fpsample", reason="the extra 'points' is not installed")
    name: Backend = request.param
    return name


def clouds(batch: int, size: int, axes: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, size, axes, generator=torch.Generator().manual_seed(seed))


def assert_farthest(cloud: Tensor, picked: Tensor, rounding: float) -> None:
    """Brute force: no point is farther from all earlier picks than the one picked."""
    cloud = cloud.double()
    assert len(set(picked.tolist())) == len(picked)
    for number in range(1, len(picked)):
        before = (cloud[:, None] - cloud[picked[:number]]).square().sum(dim=2).amin(dim=1)
        assert before[picked[number]] >= before.max() * (1 - rounding)


@pytest.mark.parametrize(
    ("size", "count", "axes"), [(1, 1, 3), (2, 2, 3), (50, 50, 3), (300, 20, 3), (64, 9, 2)]
)
def test_every_pick_maximises_the_distance(
    backend: Backend, size: int, count: int, axes: int
) -> None:
    points = clouds(3, size, axes)
    start = torch.tensor([0, size - 1, size // 2])
    result = farthest_point_sampling(points, count, start, backend=backend)
    assert last_backend("farthest_point_sampling") == backend
    assert torch.equal(result[:, 0], start)
    for cloud, picked in zip(points, result, strict=True):
        assert_farthest(cloud, picked, 4 * torch.finfo(torch.float32).eps)


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=1, max_size=20), st.data())
def test_ties_and_duplicates(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(rows)))
    points = torch.tensor(rows, dtype=torch.float32)[None]
    picked = farthest_point_sampling(points, count, backend="torch")[0]
    assert_farthest(points[0], picked, 0.0)
    different = len(set(rows))
    first = [rows[place] for place in picked.tolist()[:different]]
    assert len(set(first)) == len(first)  # no duplicate before the last different point
    # The lowest position of equally far points.
    for number in range(1, len(picked)):
        before = (points[0][:, None] - points[0][picked[:number]]).square().sum(dim=2).amin(dim=1)
        before[picked[:number]] = -1
        assert int(before.argmax()) == int(picked[number])


def test_duplicates_run_out_on_every_backend(backend: Backend) -> None:
    points = torch.zeros(1, 30, 3)
    points[0, 20:] = torch.tensor([1.0, 0.0, 0.0])
    picked = farthest_point_sampling(points, 30, 3, backend=backend)[0]
    assert picked[0] == 3
    assert picked[1] >= 20
    assert sorted(picked.tolist()) == list(range(30))


def test_a_cloud_gets_the_same_sample_in_any_batch(backend: Backend) -> None:
    points = clouds(5, 100)
    whole = farthest_point_sampling(points, 12, backend=backend)
    single = farthest_point_sampling(points[2:3], 12, backend=backend)
    assert torch.equal(single[0], whole[2])
    assert farthest_point_sampling(points[:0], 12, backend=backend).shape == (0, 12)


def test_far_from_the_origin_in_float64() -> None:
    points = clouds(1, 60).double()
    picked = farthest_point_sampling(points, 10, backend="torch")
    assert torch.equal(picked, farthest_point_sampling(points + 1e5, 10, backend="torch"))


def test_without_the_library_auto_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_installed", lambda package: package != "fpsample")
    points = clouds(1, 10)
    farthest_point_sampling(points, 3)
    assert last_backend("farthest_point_sampling") == "torch"
    with pytest.raises(MissingDependency, match=r'pip install "cmd-plugin\[points\]"'):
        farthest_point_sampling(points, 3, backend="fpsample")


def test_bad_input() -> None:
    points = clouds(2, 10)
    for count in (0, 11, True, 2.5):
        with pytest.raises(ShapeError, match=r"count must be in 1\.\.10"):
            farthest_point_sampling(points, count)  # type: ignore[arg-type]
    for start in (-1, 10, torch.tensor([0, 10])):
        with pytest.raises(ShapeError, match=r"start must be in 0\.\.9"):
            farthest_point_sampling(points, 2, start)
    for start in (0.5, torch.zeros(3).long()):
        with pytest.raises(ShapeError, match="one position or"):
            farthest_point_sampling(points, 2, start)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="points must be"):
        farthest_point_sampling(points[0], 2)
    points[1, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
        farthest_point_sampling(points, 2)
