"""Labelled clouds by name, for training: procedural ones, and those a user has on disk."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cmd_plugin.data.splits import split_indices
from cmd_plugin.errors import InputError
from cmd_plugin.jobs.points.options import POINT_DATASETS
from cmd_plugin.pointcloud import PointClouds, shape_clouds
from cmd_plugin.pointcloud.files import load_hdf5, load_voxels, voxel_clouds

__all__ = ["load_point_data"]

_TEST_SHARE = 0.2


def load_point_data(
    name: str,
    data_root: str | Path | None = None,
    points: int = 512,
    train_clouds: int | None = None,
    test_clouds: int | None = None,
    seed: int = 0,
) -> tuple[PointClouds, PointClouds]:
    """Training and held-out clouds.

    Args:
        name: ``shapes`` (procedural, embedded), ``chairs-monitors`` (voxel grids of ModelNet10 in
            ``data_root``, a fifth of them held out), or ``hdf5`` (files of ``data_root`` with
            ``train`` and ``test`` in their names, as ModelNet40 comes).
        data_root: Where data lies; by default the environment variable ``CMD_PLUGIN_DATA``.
        points: Points in a cloud.
        train_clouds: Use so many training clouds; by default 2400 procedural ones, else all.
        test_clouds: Use so many held-out clouds; by default 600 procedural ones, else all.
        seed: Seed of procedural clouds, splits and voxel points.

    Raises:
        InputError: If the name is unknown or the files are not there.
    """
    if name == "shapes":
        train = shape_clouds(train_clouds or 2400, points, seed, "train")
        return train, shape_clouds(test_clouds or 600, points, seed, "test")
    if name not in POINT_DATASETS:
        raise InputError(f"unknown --data {name!r}: choose one of {', '.join(POINT_DATASETS)}.")
    root = _root(data_root)
    if name == "chairs-monitors":
        train, test = _chairs_and_monitors(root, points, seed)
    else:
        train, test = (
            load_hdf5(_hdf5_files(root, part), points, name=root.name) for part in ("train", "test")
        )
        names = max(train.classes, test.classes, key=len)
        train = PointClouds(train.points, train.labels, names, train.name)
        test = PointClouds(test.points, test.labels, names, test.name)
    return _limited(train, train_clouds, seed), _limited(test, test_clouds, seed)


def _root(data_root: str | Path | None) -> Path:
    given = data_root or os.environ.get("CMD_PLUGIN_DATA")
    if not given:
        raise InputError(
            "this data set lies on your disk: say where by --data-root or CMD_PLUGIN_DATA."
        )
    root = Path(given)
    if not root.is_dir():
        raise InputError(f"--data-root {root} is no folder: check the path.")
    return root / "pointcloud" if (root / "pointcloud").is_dir() else root


def _chairs_and_monitors(root: Path, points: int, seed: int) -> tuple[PointClouds, PointClouds]:
    classes = ("chair", "monitor")
    clouds, labels = [], []
    for label, kind in enumerate(classes):
        grids = load_voxels(root / f"modelnet10_{kind}_voxels.npy.gz")
        clouds.append(voxel_clouds(grids, points, seed))
        labels.append(torch.full((len(grids),), label))
    data = PointClouds(torch.cat(clouds), torch.cat(labels), classes, "ModelNet10 voxels")
    train, test = split_indices(data.labels, _TEST_SHARE, seed, classes)
    return data.select(train), data.select(test)


def _hdf5_files(root: Path, part: str) -> list[Path]:
    files = sorted(p for p in root.iterdir() if p.suffix in (".h5", ".hdf5") and part in p.name)
    if not files:
        raise InputError(f"{root} holds no .h5 file with {part!r} in its name: check --data-root.")
    return files


def _limited(data: PointClouds, count: int | None, seed: int) -> PointClouds:
    if count is None or count >= len(data):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.select(order[:count])
