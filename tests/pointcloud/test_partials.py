"""The samplers: what a patch, a curve and a random subset are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.pointcloud.partials import (
    VIEWS,
    View,
    anchor_points,
    partial_clouds,
    partial_positions,
)


def clouds(batch: int = 3, points: int = 100, seed: int = 0) -> Tensor:
    return torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))


def distances(cloud: Tensor) -> Tensor:
    wide = cloud.double()
    return (wide[:, None] - wide[None]).square().sum(dim=2)


def test_anchors_are_a_farthest_point_sample_from_the_first_point() -> None:
    points = clouds()
    anchors = anchor_points(points, 4)
    assert (anchors[:, 0] == 0).all()
    for cloud, picked in zip(points, anchors, strict=True):
        square = distances(cloud)
        for number in range(1, 4):
            nearest = square[picked[:number]].amin(dim=0)
            assert int(picked[number]) == int(nearest.argmax())


def test_random_anchors_are_drawn_cloud_by_cloud() -> None:
    points = clouds(40)
    anchors = anchor_points(points, 4, random=True, seed=3)
    assert len(anchors.unique(dim=0)) == 40
    picked = torch.tensor([17, 2])
    again = anchor_points(points[picked], 4, random=True, seed=3, index=picked)
    assert torch.equal(again, anchors[picked])
    assert not torch.equal(anchor_points(points, 4, random=True, seed=4), anchors)


def test_a_patch_is_a_prefix_of_the_sorted_distances() -> None:
    points = clouds()
    anchors = anchor_points(points, 4)
    patches = partial_positions(points, "patch", anchors, 30)
    assert patches.shape == (3, 4, 30)
    for cloud, centres, rows in zip(points, anchors, patches, strict=True):
        square = distances(cloud)
        for centre, row in zip(centres.tolist(), rows, strict=True):
            expected = sorted(range(100), key=lambda place: (square[centre, place].item(), place))
            assert row.tolist() == expected[:30]
            assert row[0] == centre


def test_a_curve_steps_to_one_of_the_nineteen_neighbours() -> None:
    points = clouds()
    anchors = anchor_points(points, 4)
    curves = partial_positions(points, "curve", anchors, 200)
    assert torch.equal(curves[:, :, 0], anchors)
    for cloud, walks in zip(points, curves, strict=True):
        near = distances(cloud).fill_diagonal_(torch.inf).topk(19, largest=False).indices
        allowed = torch.zeros(100, 100, dtype=torch.bool).scatter_(1, near, value=True)
        for walk in walks:
            assert allowed[walk[:-1], walk[1:]].all()
    assert len(curves.flatten(0, 1).unique(dim=0)) == 12


def test_a_curve_of_512_steps_visits_about_287_points() -> None:
    points = clouds(8, 1024)
    curves = partial_positions(points, "curve", anchor_points(points, 4), 512)
    visited = [len(walk.unique()) for walk in curves.flatten(0, 1)]
    assert 270 < sum(visited) / len(visited) < 305


def test_random_subsets_have_no_repeats_and_differ_from_anchor_to_anchor() -> None:
    points = clouds()
    subsets = partial_positions(points, "random", anchor_points(points, 4), 30)
    assert subsets.shape == (3, 4, 30)
    for subset in subsets.flatten(0, 1):
        assert len(subset.unique()) == 30
    assert len(subsets.flatten(0, 1).sort(dim=1).values.unique(dim=0)) == 12
    reached = partial_positions(clouds(200), "random", torch.zeros(200, 1).long(), 30)
    share = reached.flatten().bincount(minlength=100) / 200
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / 200) ** 0.5


@pytest.mark.parametrize("view", VIEWS)
def test_clouds_are_the_points_at_the_positions(view: View) -> None:
    points = clouds()
    anchors = anchor_points(points, 2)
    positions = partial_positions(points, view, anchors, 17, seed=1)
    parts = partial_clouds(points, view, anchors, 17, seed=1)
    for sample in range(3):
        for place in range(2):
            assert torch.equal(parts[sample, place], points[sample, positions[sample, place]])


@pytest.mark.parametrize("view", VIEWS)
def test_parts_do_not_depend_on_the_batch(view: View) -> None:
    points = clouds(6)
    anchors = anchor_points(points, 4)
    whole = partial_positions(points, view, anchors, 40, seed=9)
    for picked in (torch.tensor([4, 1]), torch.tensor([5])):
        part = partial_positions(points[picked], view, anchors[picked], 40, seed=9, index=picked)
        assert torch.equal(part, whole[picked])
    if view != "patch":
        assert not torch.equal(partial_positions(points, view, anchors, 40, seed=8), whole)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_clouds_smaller_than_anchors_parts_and_neighbourhoods(size: int) -> None:
    points = clouds(2, size)
    anchors = anchor_points(points, 4)
    assert anchors.shape == (2, 4)
    for view in VIEWS:
        positions = partial_positions(points, view, anchors, 12)
        assert positions.shape == (2, 4, size)
        assert int(positions.max()) < size


def test_bad_input() -> None:
    points = clouds()
    anchors = anchor_points(points, 2)
    with pytest.raises(InputError, match="view 'ball' is unknown: use patch, curve, random"):
        partial_positions(points, "ball", anchors, 5)  # type: ignore[arg-type]
    for size in (0, 1.5, True):
        with pytest.raises(InputError, match="size of a partial cloud"):
            partial_positions(points, "patch", anchors, size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="neighbours"):
        partial_positions(points, "curve", anchors, 5, neighbours=1)
    for count in (0, 2.0, True):
        with pytest.raises(InputError, match="number of anchors"):
            anchor_points(points, count)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="points must be"):
        anchor_points(points[0], 2)
    points[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN"):
        partial_positions(points, "random", anchors, 5)
