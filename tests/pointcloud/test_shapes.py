"""Procedural shapes: a cloud depends on its number alone, lies in the unit ball, and varies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cmd_plugin.errors import InputError, NonFiniteError, ShapeError
from cmd_plugin.pointcloud import SHAPE_CLASSES, PointClouds, shape_clouds, unit_sphere
from cmd_plugin.pointcloud._surfaces import box, ellipsoid, frustum, sample, tube


def test_a_cloud_is_the_same_whatever_is_made_beside_it() -> None:
    few, many = shape_clouds(5, 64, seed=3), shape_clouds(30, 64, seed=3)
    assert torch.equal(few.points, many.points[:5])
    assert torch.equal(few.labels, many.labels[:5])


def test_seeds_and_splits_share_no_cloud() -> None:
    sets = [shape_clouds(24, 32, seed, split) for seed in (0, 1) for split in ("train", "test")]
    clouds = torch.cat([data.points for data in sets]).flatten(1)
    assert len({tuple(row) for row in clouds[:, :3].tolist()}) == len(clouds)


def test_classes_take_turns_and_clouds_fill_the_unit_ball() -> None:
    data = shape_clouds(3 * len(SHAPE_CLASSES), 128)
    assert len(SHAPE_CLASSES) >= 10
    assert data.labels.bincount().tolist() == [3] * len(SHAPE_CLASSES)
    radius = data.points.norm(dim=2).amax(dim=1)
    assert radius.max() <= 1.0
    assert radius.min() >= 0.7 - 1e-6
    assert data.points.dtype == torch.float32


def test_global_random_numbers_are_not_touched() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    shape_clouds(3, 16)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_surfaces_have_their_areas_and_their_points_lie_on_them() -> None:
    rng = np.random.default_rng(0)
    cube = sample([box(2.0, 2.0, 2.0)], 6000, rng)
    assert np.abs(cube).max(axis=1) == pytest.approx(1.0)
    on_side = (cube[:, 0] == 1.0).mean()  # a sixth; three standard deviations of a proportion
    assert abs(on_side - 1 / 6) < 3 * math.sqrt(1 / 6 * 5 / 6 / 6000)
    assert box(1.0, 2.0, 3.0).area == pytest.approx(22.0)

    disc, radius = frustum(1.0, 0.0, 1.0), 1.0
    assert disc.area == pytest.approx(math.pi * (radius + radius * math.sqrt(2.0)))
    cone = sample([disc], 2000, rng)
    across = np.hypot(cone[:, 0], cone[:, 1])
    side = cone[:, 2] > -0.5 + 1e-9
    assert across[side] == pytest.approx(0.5 - cone[side, 2])

    ball = sample([ellipsoid(2.0, 1.0, 0.5)], 500, rng) / (2.0, 1.0, 0.5)
    assert np.linalg.norm(ball, axis=1) == pytest.approx(1.0)

    ring = tube(1.0, 0.25, 1.0, 0.0)
    assert ring.area == pytest.approx(4 * math.pi**2 * 0.25)
    torus = sample([ring], 500, rng)
    centre = np.hypot(torus[:, 0], torus[:, 1]) - 1.0
    assert np.hypot(centre, torus[:, 2]) == pytest.approx(0.25)


def test_unit_sphere_centres_and_scales() -> None:
    points = torch.randn(2, 50, 3) * 7 + 3
    unit = unit_sphere(points)
    torch.testing.assert_close(unit.mean(dim=1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(unit.norm(dim=2).amax(dim=1), torch.ones(2))


def test_bad_sets_are_refused() -> None:
    good, labels = torch.zeros(2, 4, 3), torch.tensor([0, 1])
    with pytest.raises(ShapeError, match=r"must be \[S, N, 3\]"):
        PointClouds(good[..., :2], labels, ("a", "b"))
    with pytest.raises(ShapeError, match="as many labels"):
        PointClouds(good, labels[:1], ("a", "b"))
    with pytest.raises(InputError, match="labels must be 0 to 0"):
        PointClouds(good, labels, ("a",))
    bad = good.clone()
    bad[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="1 coordinates"):
        PointClouds(bad, labels, ("a", "b"))
    with pytest.raises(InputError, match="unknown split"):
        shape_clouds(1, 8, split="validation")
    with pytest.raises(InputError, match="at least 1"):
        shape_clouds(0)
