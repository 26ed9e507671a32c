"""Clouds from files: single clouds and meshes, voxel grids, and labelled sets in HDF5.

No format is read through a pickle. h5py and trimesh come with the extra ``points``.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmd_plugin.data.files import explain
from cmd_plugin.data.limits import DEFAULT_LIMITS
from cmd_plugin.data.npy import read_npy
from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.pointcloud._hdf5 import read_hdf5
from cmd_plugin.pointcloud._mesh import MESH_ENDINGS, read_mesh
from cmd_plugin.pointcloud._pcd import read_pcd
from cmd_plugin.pointcloud._text import read_text
from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere

__all__ = ["CLOUD_ENDINGS", "load_cloud", "load_hdf5", "load_voxels", "resampled", "voxel_clouds"]

Array = NDArray[Any]

_DAMAGED = (OSError, ValueError, EOFError, zlib.error)
_TEXT = (".xyz", ".txt", ".csv", ".pts")
CLOUD_ENDINGS = (".npy", ".npy.gz", ".pcd", *_TEXT, *MESH_ENDINGS)


def load_cloud(
    path: str | Path, points: int | None = None, seed: int = 0, *, repeat: bool = True
) -> Tensor:
    """Read one cloud, [N, 3] float32, as it is in the file (not centred or scaled).

    Args:
        path: ``.npy`` or ``.npy.gz`` [N, 3 or more]; ``.pcd`` (ascii, binary or compressed);
            ``.ply``, with or without faces; ``.off``, ``.obj``, ``.stl`` or ``.glb`` meshes,
            sampled evenly by area;
            ``.xyz``, ``.txt``, ``.csv`` or ``.pts`` with one point a line.
        points: Number of points wanted; a larger cloud is thinned out at random. By default all
            there are (2048 of a mesh).
        seed: Seed of that choice.
        repeat: Whether a smaller cloud repeats points, or has those that it has.

    Raises:
        InputError: If the file is missing, damaged, empty or of an unknown kind.
        NonFiniteError: If a coordinate is NaN or infinite.
        MissingDependency: If the format needs a package that is not installed.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        if name.endswith((".npy", ".npy.gz")):
            cloud = _read_array(path)
        elif name.endswith(".pcd"):
            cloud = read_pcd(path)
        elif name.endswith(_TEXT):
            cloud = read_text(path)
        elif name.endswith(MESH_ENDINGS):
            cloud = read_mesh(path, points or 2048, seed)
        else:
            raise InputError(
                f"{path} is of an unknown kind: use one of {', '.join(CLOUD_ENDINGS)}."
            )
    except InputError:
        raise
    except _DAMAGED as error:
        raise _unreadable(path, error) from error
    if cloud.ndim != 2 or cloud.shape[1] < 3 or len(cloud) == 0:
        raise InputError(f"{path} holds {cloud.shape} numbers, not a cloud of [N, 3] points.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        tensor = torch.from_numpy(np.ascontiguousarray(cloud[:, :3], dtype=np.float32))
    wrong = int((~torch.isfinite(tensor).all(dim=1)).sum())
    if wrong:
        raise NonFiniteError(f"{path}: {wrong} points are NaN or infinite: remove them.")
    if points is None:
        return tensor
    return resampled(tensor, points if repeat else min(points, len(tensor)), seed)


def resampled(cloud: Tensor, points: int, seed: int = 0) -> Tensor:
    """So many points of a cloud [N, C], in random order: without repeats while there are enough.

    Raises:
        InputError: If ``points`` is not positive.
    """
    if points < 1:
        raise InputError(f"points must be at least 1, got {points}.")
    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(cloud)) for _ in range(-(-points // len(cloud)))]
    return cloud[torch.from_numpy(np.concatenate(order)[:points])]


def _read_array(path: Path, kinds: str = "fiu") -> Array:
    if path.suffix.lower() != ".gz":
        with path.open("rb") as stream:
            return read_npy(stream, path.stat().st_size, kinds)
    with gzip.open(path) as unpacked:
        return read_npy(unpacked, DEFAULT_LIMITS.memory_bytes, kinds)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({explain(error)}): make or copy it again.")


def load_hdf5(
    paths: Sequence[str | Path],
    points: int | None = None,
    classes: Sequence[str] | None = None,
    name: str = "HDF5",
) -> PointClouds:
    """Read labelled clouds as ModelNet40, ModelNet-C and ScanObjectNN distribute them.

    Args:
        paths: Files with datasets ``data`` [S, N, 3 or more] and ``label`` [S] or [S, 1].
        points: Use the first so many points of each cloud, as the published protocols do.
        classes: Class names; by default those of ``shape_names.txt`` beside the first file, else
            numbers.
        name: What tables call the set.

    Raises:
        InputError: If a file is missing, damaged, lacks a dataset, or holds something else in it
            than clouds and whole numbers from 0 on.
        MissingDependency: If h5py is not installed.
    """
    if not paths:
        raise InputError("no HDF5 file was given.")
    parts = [read_hdf5(Path(path), points) for path in paths]
    clouds, labels = [cloud for cloud, _ in parts], [label for _, label in parts]
    sizes = {cloud.shape[1] for cloud in clouds}
    if len(sizes) > 1 or (points is not None and sizes != {points}):
        raise InputError(
            f"{paths[0]}: clouds have {sorted(sizes)} points, but {points or 'equally many'} are "
            "needed: ask for fewer."
        )
    joined = np.concatenate(labels)
    beside = Path(paths[0]).parent / "shape_names.txt"
    if classes is None and beside.is_file():
        try:
            classes = beside.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(beside, error) from error
    if classes is None:
        classes = [str(number) for number in range(int(joined.max()) + 1)]
    return PointClouds(
        torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(joined), tuple(classes), name
    )


def load_voxels(path: str | Path) -> Tensor:
    """Read voxel grids, [S, X, Y, Z] bool, from ``.npy`` or ``.npy.gz`` [S, 1, X, Y, Z].

    Empty grids are left out.

    Raises:
        InputError: If the file is missing, damaged, holds something else or nothing but empty
            grids.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        array = _read_array(path, kinds="fiub")
    except _DAMAGED as error:
        raise _unreadable(path, error) from error
    if array.ndim == 5 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 4:
        raise InputError(f"{path} is {array.shape}, not voxel grids [S, 1, X, Y, Z].")
    grids = torch.from_numpy(np.ascontiguousarray(array > 0))
    occupied = grids[grids.flatten(1).any(dim=1)]
    if not len(occupied):
        raise InputError(f"{path} holds no grid with an occupied voxel: make it again.")
    return occupied


def voxel_clouds(
    grids: Tensor,
    points: int = 1024,
    seed: int = 0,
    axes: tuple[int, int, int] = (0, 2, 1),
    draw: int = 0,
) -> Tensor:
    """Clouds from voxel grids: random points inside the surface voxels, in the unit sphere.

    A surface voxel is an occupied one with an empty face neighbour. Each point lies anywhere within
    its voxel. Cloud number i depends on (seed, i, draw) alone.

    Args:
        grids: [S, X, Y, Z] bool, none empty.
        points: Points in a cloud; voxels repeat if there are fewer of them.
        seed: Seed of the whole set.
        axes: Order of the grid's axes in the cloud; the default turns the grids of ModelNet10 into
            the axes (y up) of the common ModelNet40 clouds.
        draw: Another number gives other points of the same shapes.

    Returns:
        [S, points, 3] float32.
    """
    clouds = torch.empty(len(grids), points, 3)
    for number, grid in enumerate(grids.numpy()):
        rng = np.random.default_rng([seed, number, draw])
        padded = np.pad(grid, 1)
        inside = np.ones_like(grid)
        for axis in range(3):
            for step in (-1, 1):
                inside &= np.roll(padded, step, axis=axis)[1:-1, 1:-1, 1:-1]
        voxels = np.argwhere(grid & ~inside)
        order = [rng.permutation(len(voxels)) for _ in range(-(-points // len(voxels)))]
        chosen = voxels[np.concatenate(order)[:points]]
        placed = chosen + rng.uniform(-0.5, 0.5, chosen.shape)
        clouds[number] = torch.from_numpy(placed[:, list(axes)]).float()
    return unit_sphere(clouds)
