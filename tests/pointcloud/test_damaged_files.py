"""Clouds, meshes, voxels and sets damaged at random: read, or refused with one sentence."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud import FocusReference, build_network
from cmd_plugin.pointcloud.defences import initial_defences
from cmd_plugin.pointcloud.files import load_cloud, load_hdf5, load_voxels
from tests.helpers.damage import MUTATIONS, refuses_damaged
from tests.pointcloud.test_files import compressed

CLOUD = np.random.default_rng(0).normal(size=(30, 3)).round(3).astype(np.float32)
PCD = (
    "# .PCD v.7\nVERSION .7\nFIELDS x y z i\nSIZE 4 4 4 1\nTYPE F F F U\nCOUNT 1 1 1 2\nWIDTH 30\n"
    "HEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 30\nDATA "
)
PLY = (
    "ply\nformat {}\ncomment a box\nelement vertex 30\nproperty float x\nproperty float y\n"
    "property float z\nelement face 4\nproperty list uchar int vertex_indices\nend_header\n"
)
FACES = ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9), (10, 11, 12))


def lines(rows: np.ndarray, mark: str = " ", *more: object) -> str:
    return "".join(mark.join(f"{v:g}" for v in (*row, *more)) + "\n" for row in rows.tolist())


def faces() -> str:
    return "".join(f"{len(face)} {' '.join(map(str, face))}\n" for face in FACES)


def binary_ply(order: str) -> bytes:
    body = CLOUD.astype(f"{order}f4").tobytes()
    body += b"".join(struct.pack(f"{order}B{len(f)}i", len(f), *f) for f in FACES)
    kind = "binary_little_endian 1.0" if order == "<" else "binary_big_endian 1.0"
    return PLY.format(kind).encode() + body


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def box(kind: str) -> bytes:
    trimesh = pytest.importorskip("trimesh")
    written = trimesh.creation.box().export(file_type=kind)
    return written if isinstance(written, bytes) else written.encode()


def pcd(kind: str) -> bytes:
    if kind == "ascii":
        body = lines(CLOUD, " ", 7, 8).encode()
    elif kind == "binary":
        body = b"".join(struct.pack("<fffBB", *row, 7, 8) for row in CLOUD.tolist())
    else:
        body = compressed(CLOUD.T.tobytes() + bytes(60))
    return f"{PCD}{kind}\n".encode() + body


FILES: dict[str, Callable[[], bytes]] = {
    "x.xyz": lambda: lines(CLOUD).encode(),
    "x.csv": lambda: ("x,y,z,t\n" + lines(CLOUD, ",", 1)).encode(),
    "x.pts": lambda: ("30\n" + lines(CLOUD)).encode(),
    "ascii.pcd": lambda: pcd("ascii"),
    "binary.pcd": lambda: pcd("binary"),
    "packed.pcd": lambda: pcd("binary_compressed"),
    "x.npy": lambda: saved(CLOUD),
    "columns.npy": lambda: saved(np.asfortranarray(CLOUD.astype(">f8"))),
    "x.off": lambda: ("OFF\n30 4 0\n" + lines(CLOUD) + faces()).encode(),
    "ascii.ply": lambda: (PLY.format("ascii 1.0") + lines(CLOUD) + faces()).encode(),
    "little.ply": lambda: binary_ply("<"),
    "big.ply": lambda: binary_ply(">"),
    "x.obj": lambda: box("obj"),
    "x.stl": lambda: box("stl"),
    "ascii.stl": lambda: box("stl_ascii"),
    "x.glb": lambda: box("glb"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cloud_is_read_or_refused(name: str, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        assert load_cloud(path, 50).shape == (50, 3)

    if FILES[name]()[:3] in (b"ply", b"OFF"):
        pytest.importorskip("trimesh")
    assert refuses_damaged(tmp_path / name, FILES[name](), read) > 20


@pytest.mark.parametrize("name", ["x.npy", "x.npy.gz"])
def test_damaged_voxels_are_read_or_refused(name: str, tmp_path: Path) -> None:
    grids = np.random.default_rng(0).random((3, 1, 4, 4, 4)) < 0.3
    pack = gzip.compress if name.endswith(".gz") else bytes
    whole = saved(grids.astype(np.float64))
    assert refuses_damaged(tmp_path / name, whole, load_voxels, pack) > 20
    assert refuses_damaged(tmp_path / name, pack(whole), load_voxels, mutations=40) > 10


def test_a_damaged_hdf5_file_is_read_or_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "train.h5"
    with h5py.File(path, "w") as file:
        file["label"] = np.arange(3, dtype=np.uint8)[:, None]
        data = np.random.default_rng(0).normal(size=(3, 20, 3)).astype(np.float32)
        file.create_dataset("data", data=data, compression="gzip")
    assert refuses_damaged(path, path.read_bytes(), lambda path: load_hdf5([path])) > 20


def test_a_damaged_focus_reference_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "focus.safetensors"
    FocusReference(40).save(path)
    whole = path.read_bytes()

    def read(path: Path) -> None:
        FocusReference.load(path).state_dict()

    assert refuses_damaged(path, whole, read, mutations=min(MUTATIONS, 400)) > 20


def test_damaged_defences_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "networks.safetensors"
    settings = {"model": "pointnet", "seed": 0}

    def make() -> nn.Module:
        return build_network("pointnet", 2, 0.0625)

    initial_defences(make, 32, 0).save(path, settings)
    fresh = initial_defences(make, 32, 1)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}

    def read(path: Path) -> None:
        try:
            fresh.load(path, settings)
        except InputError:  # whole or not at all
            for name, tensor in fresh.state_dict().items():
                torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
            raise
        before.update({name: tensor.clone() for name, tensor in fresh.state_dict().items()})

    assert refuses_damaged(path, path.read_bytes(), read, mutations=min(MUTATIONS, 400)) > 20
