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

from cmd_plugin.errors import InputError, NonFiniteError, require
from cmd_plugin.pointcloud._pcd import read_pcd
from cmd_plugin.pointcloud.clouds import PointClouds, unit_sphere

__all__ = ["CLOUD_ENDINGS", "load_cloud", "load_hdf5", "load_voxels", "resampled", "voxel_clouds"]

Array = NDArray[Any]

_TEXT = (".xyz", ".txt", ".csv", ".pts")
_MESH = (".glb", ".obj", ".off", ".ply", ".stl")
CLOUD_ENDINGS = (".npy", ".npy.gz", ".pcd", *_TEXT, *_MESH)


def load_cloud(path: str | Path, points: int | None = None, seed: int = 0) -> Tensor:
    """Read one cloud, [N, 3] float32, as it is in the file (not centred or scaled).

    Args:
        path: ``.npy`` or ``.npy.gz`` [N, 3 or more]; ``.pcd`` (ascii, binary or compressed);
            ``.ply``, with or without faces; ``.off``, ``.obj``, ``.stl`` or ``.glb`` meshes,
            sampled evenly by area;
            ``.xyz``, ``.txt``, ``.csv`` or ``.pts`` with one point a line.
        points: Number of points wanted; a larger cloud is thinned out at random, and a smaller one
            repeats points. By default all there are (2048 of a mesh).
        seed: Seed of that choice.

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
            text = path.read_text(encoding="utf-8").replace(",", " ")
            cloud = np.loadtxt(text.splitlines(), ndmin=2)
        elif name.endswith(_MESH):
            cloud = _read_mesh(path, points or 2048, seed)
        else:
            raise InputError(
                f"{path} is of an unknown kind: use one of {', '.join(CLOUD_ENDINGS)}."
            )
    except (OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({error}): make or copy it again.") from error
    if cloud.ndim != 2 or cloud.shape[1] < 3 or len(cloud) == 0:
        raise InputError(f"{path} holds {cloud.shape} numbers, not a cloud of [N, 3] points.")
    tensor = torch.from_numpy(np.ascontiguousarray(cloud[:, :3], dtype=np.float32))
    wrong = int((~torch.isfinite(tensor).all(dim=1)).sum())
    if wrong:
        raise NonFiniteError(f"{path}: {wrong} points are NaN or infinite: remove them.")
    return tensor if points is None else resampled(tensor, points, seed)


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


def _read_array(path: Path) -> Array:
    if path.suffix != ".gz":
        return np.asarray(np.load(path, allow_pickle=False))
    with gzip.open(path) as unpacked:
        return np.asarray(np.load(unpacked, allow_pickle=False))


def _read_mesh(path: Path, points: int, seed: int) -> Array:
    trimesh = require("trimesh", "points")
    try:
        scene = trimesh.load(str(path), process=False)
        shape = scene.to_mesh() if hasattr(scene, "to_mesh") else scene
    except Exception as error:  # each format fails in its own way on damaged files
        raise InputError(f"{path} cannot be read ({error}): make or copy it again.") from error
    if len(getattr(shape, "faces", ())) == 0:
        vertices: Array = np.asarray(shape.vertices)
        return vertices
    sampled: Array = trimesh.sample.sample_surface(shape, points, seed=seed)[0]
    return sampled


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
        InputError: If a file is missing, damaged, or lacks a dataset.
        MissingDependency: If h5py is not installed.
    """
    if not paths:
        raise InputError("no HDF5 file was given.")
    parts = [_read_hdf5(Path(path), points) for path in paths]
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
        classes = beside.read_text(encoding="utf-8").split()
    if classes is None:
        classes = [str(number) for number in range(int(joined.max()) + 1)]
    return PointClouds(
        torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(joined), tuple(classes), name
    )


def _read_hdf5(path: Path, points: int | None) -> tuple[Array, Array]:
    h5py = require("h5py", "points")
    try:
        with h5py.File(path, "r") as file:
            if not {"data", "label"} <= set(file):
                raise InputError(
                    f"{path} holds {', '.join(sorted(file)) or 'nothing'}, but the datasets data "
                    "and label are needed."
                )
            data = file["data"]
            if data.ndim != 3 or data.shape[2] < 3:
                raise InputError(f"{path}: data is {data.shape}, not [S, N, 3].")
            clouds = np.asarray(data[:, :points, :3], dtype=np.float32)
            return clouds, np.asarray(file["label"][()], dtype=np.int64).reshape(-1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): check the path.") from error


def load_voxels(path: str | Path) -> Tensor:
    """Read voxel grids, [S, X, Y, Z] bool, from ``.npy`` or ``.npy.gz`` [S, 1, X, Y, Z].

    Empty grids are left out.

    Raises:
        InputError: If the file is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    try:
        array = _read_array(path)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): make or copy it again.") from error
    if array.ndim == 5 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 4:
        raise InputError(f"{path} is {array.shape}, not voxel grids [S, 1, X, Y, Z].")
    grids = torch.from_numpy(array > 0)
    return grids[grids.flatten(1).any(dim=1)]


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
