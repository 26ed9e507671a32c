"""Meshes: as trimesh reads them, and what it reads wrong is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from cmd_plugin.errors import InputError, NonFiniteError
from cmd_plugin.pointcloud._mesh import _read_off
from cmd_plugin.pointcloud._ply import read_ply
from cmd_plugin.pointcloud.files import load_cloud
from tests.helpers.sentences import assert_one_sentence

trimesh = pytest.importorskip("trimesh")
SQUARE = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
PLY = "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\n"
PLY += "property float z\n"


@pytest.mark.parametrize("kind", ["ascii", "binary"])
@pytest.mark.parametrize("coloured", [False, True])
def test_a_ply_file_is_read_as_trimesh_reads_it(kind: str, coloured: bool, tmp_path: Path) -> None:
    mesh = trimesh.creation.icosphere(2)
    if coloured:
        mesh.visual.vertex_colors = np.tile([9, 8, 7, 255], (len(mesh.vertices), 1))
    mesh.export(tmp_path / "a.ply", encoding=kind)
    vertices, faces = read_ply(tmp_path / "a.ply")
    found = trimesh.load(tmp_path / "a.ply", process=False)
    # trimesh keeps what it reads of text in the file's float32.
    np.testing.assert_allclose(vertices, found.vertices, rtol=2**-24 if kind == "ascii" else 0)
    np.testing.assert_array_equal(faces, found.faces)


def test_an_off_file_is_read_as_trimesh_reads_it(tmp_path: Path) -> None:
    trimesh.creation.icosphere(2).export(tmp_path / "a.off")
    text = (tmp_path / "a.off").read_text()
    (tmp_path / "joined.off").write_text(text.replace("OFF\n", "OFF", 1))  # as in ModelNet40
    found = trimesh.load(tmp_path / "a.off", process=False)
    for name in ("a.off", "joined.off"):
        vertices, faces = _read_off(tmp_path / name)
        np.testing.assert_allclose(vertices, found.vertices)
        np.testing.assert_array_equal(faces, found.faces)


@pytest.mark.parametrize("order", ["<", ">"])
def test_polygons_of_any_size_become_fans(order: str, tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    faces = [list(map(int, dice.integers(0, 4, dice.choice((3, 3, 3, 4, 5))))) for _ in range(200)]
    words = {"<": "little", ">": "big"}
    head = PLY.replace("ascii", f"binary_{words[order]}_endian") + "element face 200\n"
    head += "property uchar flag\nproperty list ushort uint vertex_index\nend_header\n"
    body = np.arange(12, dtype=f"{order}f4").tobytes()
    body += b"".join(struct.pack(f"{order}BH{len(f)}I", 1, len(f), *f) for f in faces)
    (tmp_path / "a.ply").write_bytes(head.encode() + body)
    vertices, triangles = read_ply(tmp_path / "a.ply")
    assert vertices.tolist() == np.arange(12.0).reshape(4, 3).tolist()
    expected = [(f[0], f[i - 1], f[i]) for f in faces for i in range(2, len(f))]
    assert sorted(map(tuple, triangles.tolist())) == sorted(expected)
    for cut in range(1, 400):
        (tmp_path / "a.ply").write_bytes((head.encode() + body)[:-cut])
        with pytest.raises(InputError, match="ends before"):
            read_ply(tmp_path / "a.ply")


def test_what_stands_before_and_behind_is_passed_over(tmp_path: Path) -> None:
    head = "ply\nformat ascii 1.0\nelement camera 1\nproperty list int float m\n" + PLY[21:]
    head += "element face 0\nproperty list uchar int vertex_indices\nelement edge 1\n"
    (tmp_path / "a.ply").write_text(head + "property int a\nend_header\n2 1.5 2\n" + SQUARE + "7\n")
    assert load_cloud(tmp_path / "a.ply").tolist()[2] == [1.0, 1.0, 0.0]


def off(faces: str, count: int = 2) -> str:
    return f"OFF\n4 {count} 0\n{SQUARE}{faces}"


FACES = "property list uchar int vertex_indices\nend_header\n"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.off", off("3 0 1 2\n"), "ends before its 4 vertices and 2 faces"),
        ("a.off", off("3 0 1 2\n3 0 2\n"), "3 corners that names 2"),
        ("a.off", off("3 0 1 2\n3 0 2 4\n"), "face at vertex 4"),
        ("a.off", off("3 0 1 2\n3 0 2 -1\n"), "or -1"),
        ("a.off", off("3 0 1 2\n3 0 2 99999999999999999999\n"), "or -1"),
        ("a.off", off("3 0 1 2\n3 0 2 1.5\n"), "cannot be read"),
        ("a.off", off("3 0 1 1\n3 0 2 0\n"), "area 0"),
        ("a.off", "4OFF\n1 0 0\n0 0 0 1\n", "no OFF file"),
        ("a.off", "OFF BINARY\n", "no OFF file"),
        ("a.off", "", "no OFF file"),
        (
            "a.ply",
            PLY + "element face 2\n" + FACES + SQUARE + "3 0 1 2\n",
            "ends before its 2 faces",
        ),
        ("a.ply", PLY + "element face 1\n" + FACES + SQUARE + "3 0 1 9\n", "face at vertex 9"),
        ("a.ply", PLY + "element face 1\n" + FACES + SQUARE + "3 0 1 1.5\n", "no numbers of vert"),
        ("a.ply", PLY + "element face 1\n" + FACES + SQUARE + "3 0 1 nan\n", "no numbers of vert"),
        ("a.ply", PLY + "element face 1\n" + FACES + SQUARE + "-3 0 1 2\n", "a list of -3 values"),
        ("a.ply", PLY + "element tristrips 1\n" + FACES + SQUARE + "5 0 1 2 3 -1\n", "as strips"),
        ("a.ply", PLY + "end_header\n" + SQUARE[:-10], "ends before its 4 vertexs"),
        ("a.ply", "ply\nformat ascii 1.0\nend_header\n", "one list of vertices"),
        ("a.ply", PLY.replace("ascii", "zip") + "end_header\n" + SQUARE, "header is damaged"),
        ("a.ply", PLY.replace("float z", "float y") + "end_header\n" + SQUARE, "is damaged"),
        ("a.ply", PLY.replace("float z", "float w") + "end_header\n" + SQUARE, "no z of"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", ""),
        ("a.stl", "solid\n", ""),
    ],
)
def test_a_mesh_that_is_cut_off_or_damaged_is_refused(
    name: str, text: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_cloud(tmp_path / name, 20)
    assert_one_sentence(caught.value, name, why)


def test_a_vertex_that_is_no_number_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.off").write_text(off("3 0 1 2\n3 0 2 3\n").replace("1 1 0", "1 nan 0"))
    with pytest.raises(NonFiniteError, match="1 points are NaN"):
        load_cloud(tmp_path / "a.off", 20)
