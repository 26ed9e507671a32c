"""Procedural shapes: twelve classes of clouds made from a seed, for first runs without a download.

Synthetic, and easier than scans of real things: never report an accuracy on them without saying so.
Cloud number i of a split depends on (seed, split, i) alone, whatever else is made beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud._surfaces import Surface, box, ellipsoid, frustum, sample, tube
from cmd_plugin.pointcloud.clouds import PointClouds

__all__ = ["SHAPE_CLASSES", "make_shape", "shape_clouds"]

Array = NDArray[np.float64]

_SPLITS = {"train": 0, "test": 1}
_MARGIN = 3  # points made for each point kept: the others fall to the view and the uneven density
_TILT = np.deg2rad(20.0)
_NOISE = 0.005  # standard deviation of the sensor, in units of the shape's radius


def shape_clouds(
    count: int, points: int = 1024, seed: int = 0, split: str = "train"
) -> PointClouds:
    """Make ``count`` labelled clouds; classes take turns, so that they are equally frequent.

    Each cloud has random proportions, a random pose (any turn about z, tilted by up to 20 degrees),
    a random scale (largest radius 0.7 to 1), uneven density in half of the cases, a partial view in
    half of the cases (one side of 10 to 40 % is missing), and sensor noise. z is up.

    Args:
        count: Number of clouds.
        points: Points in a cloud.
        seed: Seed of the whole set.
        split: ``train`` or ``test``; they share no cloud.

    Raises:
        InputError: If a number is not positive, or the split is unknown.
    """
    if split not in _SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(_SPLITS)}.")
    if count < 1 or points < 1:
        raise InputError(f"count and points must be at least 1, got {count} and {points}.")
    clouds = np.empty((count, points, 3), dtype=np.float32)
    labels = np.arange(count, dtype=np.int64) % len(SHAPE_CLASSES)
    for index in range(count):
        clouds[index] = make_shape(int(labels[index]), points, seed, index, split)
    return PointClouds(
        torch.from_numpy(clouds), torch.from_numpy(labels), SHAPE_CLASSES, "procedural shapes"
    )


def make_shape(label: int, points: int, seed: int, index: int, split: str = "train") -> Array:
    """One cloud, [points, 3] float64; the same for the same arguments, on its own or in a set."""
    key = np.array((seed, index * len(_SPLITS) + _SPLITS[split]), dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    surfaces = _BUILDERS[SHAPE_CLASSES[label]](rng)
    cloud = sample(surfaces, _MARGIN * points, rng)
    cloud = _to_unit(cloud) @ _pose(rng).T
    cloud = cloud[_seen(cloud, points, rng)]
    cloud = _to_unit(cloud + rng.normal(0.0, _NOISE, cloud.shape))
    shape: Array = cloud * rng.uniform(0.7, 1.0)
    return shape


def _to_unit(cloud: Array) -> Array:
    centred = cloud - cloud.mean(axis=0)
    unit: Array = centred / np.linalg.norm(centred, axis=1).max()
    return unit


def _direction(rng: np.random.Generator) -> Array:
    vector = rng.normal(size=3)
    unit: Array = vector / np.linalg.norm(vector)
    return unit


def _pose(rng: np.random.Generator) -> Array:
    """A turn about z, then a tilt about a random horizontal axis."""
    turn, axis, tilt = rng.uniform((0.0, 0.0, 0.0), (2 * np.pi, 2 * np.pi, _TILT))
    about = np.array(((np.cos(turn), -np.sin(turn), 0), (np.sin(turn), np.cos(turn), 0), (0, 0, 1)))
    x, y = np.cos(axis), np.sin(axis)
    cross = np.array(((0, 0, y), (0, 0, -x), (-y, x, 0)))
    tilted = np.eye(3) + np.sin(tilt) * cross + (1.0 - np.cos(tilt)) * cross @ cross
    pose: Array = tilted @ about
    return pose


def _seen(cloud: Array, points: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which points are kept: a partial view, then an uneven density, then random order."""
    weight = np.ones(len(cloud))
    if rng.random() < 0.5:
        height = cloud @ _direction(rng)
        weight[height > np.quantile(height, rng.uniform(0.6, 0.9))] = 0.0
    if rng.random() < 0.5:
        weight *= np.exp(rng.uniform(0.5, 1.5) * (cloud @ _direction(rng)))
    # Weighted choice without replacement: the largest of log(u) / w (Efraimidis and Spirakis).
    with np.errstate(divide="ignore"):
        rank = np.log(rng.random(len(cloud))) / weight
    kept: NDArray[np.int64] = rng.permutation(np.argpartition(rank, -points)[-points:])
    return kept


# -- the classes ----------------------------------------------------------------------------------


def _ellipsoid(rng: np.random.Generator) -> list[Surface]:
    return [ellipsoid(*rng.uniform(0.7, 1.3, 3))]


def _box(rng: np.random.Generator) -> list[Surface]:
    return [box(*rng.uniform(0.8, 1.6, 3))]


def _cylinder(rng: np.random.Generator) -> list[Surface]:
    radius = rng.uniform(0.3, 0.6)
    return [frustum(radius, radius, rng.uniform(1.2, 2.0))]


def _cone(rng: np.random.Generator) -> list[Surface]:
    return [frustum(rng.uniform(0.5, 0.9), 0.0, rng.uniform(1.2, 1.8))]


def _torus(rng: np.random.Generator) -> list[Surface]:
    return [tube(1.0, rng.uniform(0.18, 0.38), 1.0, 0.0)]


def _helix(rng: np.random.Generator) -> list[Surface]:
    return [tube(0.6, rng.uniform(0.06, 0.12), rng.uniform(2.5, 4.0), rng.uniform(1.4, 2.2))]


def _cross(rng: np.random.Generator) -> list[Surface]:
    width = rng.uniform(0.15, 0.3)
    x, y, z = rng.uniform(1.5, 2.0, 3)
    return [box(x, width, width), box(width, y, width), box(width, width, z)]


def _legs(x: float, y: float, height: float, width: float, z: float) -> list[Surface]:
    leg = box(width, width, height)
    return [leg.at(sx * x, sy * y, z - height / 2) for sx in (-1, 1) for sy in (-1, 1)]


def _table(rng: np.random.Generator) -> list[Surface]:
    x, y, height = rng.uniform((1.2, 0.8, 0.6), (2.0, 1.4, 1.1))
    inset = rng.uniform(0.85, 0.95) / 2
    return [box(x, y, 0.08), *_legs(x * inset, y * inset, height, 0.09, -0.04)]


def _chair(rng: np.random.Generator) -> list[Surface]:
    side, height, back = rng.uniform((0.7, 0.5, 0.7), (1.0, 0.8, 1.1))
    rest = box(side, 0.08, back).at(y=side / 2, z=back / 2)
    return [box(side, side, 0.08), rest, *_legs(side * 0.45, side * 0.45, height, 0.08, -0.04)]


def _stairs(rng: np.random.Generator) -> list[Surface]:
    steps = int(rng.integers(3, 6))
    width, depth, rise = rng.uniform((0.7, 0.25, 0.2), (1.2, 0.4, 0.35))
    return [
        box(width, depth, rise * (step + 1)).at(y=depth * step, z=rise * (step + 1) / 2)
        for step in range(steps)
    ]


def _mug(rng: np.random.Generator) -> list[Surface]:
    radius, height = rng.uniform((0.4, 0.8), (0.6, 1.2))
    reach = height * rng.uniform(0.25, 0.35)
    handle = tube(reach, 0.07, 0.5, 0.0).turned((1, 2, 0)).at(x=radius)
    return [frustum(radius * rng.uniform(0.8, 1.0), radius, height, lid=False), handle]


def _dumbbell(rng: np.random.Generator) -> list[Surface]:
    radius, length = rng.uniform((0.3, 1.0), (0.45, 1.6))
    ball = ellipsoid(radius, radius, radius)
    bar = frustum(0.09, 0.09, length).turned((2, 0, 1))
    return [ball.at(x=-length / 2), ball.at(x=length / 2), bar]


_BUILDERS: dict[str, Callable[[np.random.Generator], list[Surface]]] = {
    "ellipsoid": _ellipsoid,
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "helix": _helix,
    "cross": _cross,
    "table": _table,
    "chair": _chair,
    "stairs": _stairs,
    "mug": _mug,
    "dumbbell": _dumbbell,
}

SHAPE_CLASSES = tuple(_BUILDERS)
"""Names of the twelve classes; a label is an index into them."""
