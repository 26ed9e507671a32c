"""Meshes: their points, drawn evenly by area, or their vertices if they have no faces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.data.files import explain
from cmd_plugin.errors import InputError, NonFiniteError, require
from cmd_plugin.pointcloud._ply import fans, read_ply

__all__ = ["MESH_ENDINGS", "read_mesh"]

Array = NDArray[Any]

MESH_ENDINGS = (".glb", ".obj", ".off", ".ply", ".stl")


def read_mesh(path: Path, points: int, seed: int) -> Array:
    """Read points of a mesh, [points, 3]; of a file without faces its vertices, [V, 3].

    Raises:
        InputError: If the file is damaged or cut off, or the mesh has no area.
        NonFiniteError: If a vertex is NaN or infinite.
        ValueError: If a word of a text file is no number.
        MissingDependency: If trimesh is needed and not installed.
    """
    vertices, faces = _READERS.get(path.suffix.lower(), _read_other)(path)
    if not len(faces):
        return vertices
    if int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
        raise InputError(
            f"{path} has a face at vertex {int(faces.max())} or {int(faces.min())}, of "
            f"{len(vertices)} vertices from 0 on: make or copy it again."
        )
    wrong = int((~np.isfinite(vertices)).any(axis=1).sum())
    if wrong:
        raise NonFiniteError(f"{path}: {wrong} points are NaN or infinite: remove them.")
    trimesh = require("trimesh", "points")
    with np.errstate(all="ignore"):
        mesh = trimesh.Trimesh(vertices, faces, process=False)
        area = float(mesh.area)
        if not 0 < area < np.inf:
            raise InputError(f"{path} has faces of area {area:g} in all: scale or make it again.")
        sampled: Array = trimesh.sample.sample_surface(mesh, points, seed=seed)[0]
    return sampled


def _read_off(path: Path) -> tuple[Array, Array]:
    """Vertices and triangles of an OFF file, also of one whose counts follow the word at once."""
    text = path.read_bytes().decode("ascii", errors="replace")
    lines = [kept for line in text.splitlines() if (kept := line.partition("#")[0].strip())]
    kind = next(
        (k for k in ("COFF", "NOFF", "CNOFF", "OFF") if lines and lines[0].startswith(k)), ""
    )
    if kind:
        joined = lines[0][len(kind) :].strip()
        lines = [joined, *lines[1:]] if joined else lines[1:]
    counts = lines[0].split() if lines else []
    if (
        not kind
        or len(counts) not in (2, 3)
        or not all(c.isdecimal() and len(c) < 10 for c in counts)
    ):
        raise InputError(f"{path} is no OFF file of text, or its header is damaged: copy it again.")
    vertices, faces = int(counts[0]), int(counts[1])
    if len(lines) < 1 + vertices + faces:
        raise InputError(
            f"{path} ends before its {vertices} vertices and {faces} faces: copy it again."
        )
    places: Array = np.empty((0, 3))
    if vertices:
        places = np.loadtxt(lines[1 : 1 + vertices], comments=None, ndmin=2)
    if places.shape[1] < 3:
        raise InputError(f"{path} has vertices of {places.shape[1]} numbers: copy it again.")
    by_corners: dict[int, list[list[int]]] = {}
    for line in lines[1 + vertices : 1 + vertices + faces]:
        corners, *rest = line.split()
        size = int(corners)
        if not 0 <= size <= len(rest):
            raise InputError(f"{path} has a face of {corners} corners that names {len(rest)}.")
        by_corners.setdefault(size, []).append([_index(word) for word in rest[:size]])
    return places[:, :3], fans(path, [np.array(rows, np.int64) for rows in by_corners.values()])


def _index(word: str) -> int:
    """The number of a vertex; -1, which no vertex has, for what no array can hold."""
    number = int(word)
    return number if 0 <= number < 2**31 else -1


def _read_other(path: Path) -> tuple[Array, Array]:
    trimesh = require("trimesh", "points")
    options = {"skip_materials": True} if path.suffix.lower() == ".obj" else {}
    try:
        scene = trimesh.load(str(path), process=False, **options)
        shape = scene.to_mesh() if hasattr(scene, "to_mesh") else scene
        vertices, faces = np.asarray(shape.vertices), np.asarray(getattr(shape, "faces", ()))
    except Exception as error:  # each format fails in its own way on damaged files
        raise InputError(
            f"{path} cannot be read ({explain(error)}): make or copy it again."
        ) from error
    return vertices, faces


_READERS: dict[str, Callable[[Path], tuple[Array, Array]]] = {".off": _read_off, ".ply": read_ply}
