"""Every format against a file the test writes; damaged ones end in one sentence."""

from __future__ import annotations

import contextlib
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin import errors
from cmd_plugin.errors import InputError, MissingDependency, NonFiniteError
from cmd_plugin.pointcloud._pcd import lzf_unpacked
from cmd_plugin.pointcloud.files import (
    load_cloud,
    load_hdf5,
    load_voxels,
    resampled,
    voxel_clouds,
)

POINTS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=np.float32)
HEADER = (
    "VERSION .7\nFIELDS x y z i\nSIZE 4 4 4 1\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 4\nHEIGHT 1\n"
)
HEADER = "# .PCD v.7\n" + HEADER + "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 4\nDATA "


def write(folder: Path, ending: str) -> Path:
    path = folder / f"cloud{ending}"
    rows = [" ".join(f"{v:g}" for v in row) for row in POINTS]
    if ending == ".npy":
        np.save(path, POINTS)
    elif ending == ".npy.gz":
        with gzip.open(path, "wb") as stream:
            np.save(stream, POINTS)
    elif ending == ".xyz":
        path.write_text("\n".join(rows))
    elif ending == ".csv":
        path.write_text("\n".join(row.replace(" ", ",") for row in rows))
    elif ending == ".pcd":
        path.write_text(HEADER + "ascii\n" + "\n".join(row + " 7" for row in rows) + "\n")
    elif ending == ".ply":
        head = "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\n"
        path.write_text(head + "property float z\nend_header\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("ending", [".npy", ".npy.gz", ".xyz", ".csv", ".pcd", ".ply"])
def test_a_cloud_is_read_as_it_was_written(ending: str, tmp_path: Path) -> None:
    if ending == ".ply":
        pytest.importorskip("trimesh")
    cloud = load_cloud(write(tmp_path, ending))
    assert cloud.dtype == torch.float32
    assert cloud.tolist() == POINTS.tolist()


def test_binary_pcd_with_missing_points(tmp_path: Path) -> None:
    rows = [struct.pack("<fffB", *row, 7) for row in POINTS.tolist()]
    rows[2] = struct.pack("<fffB", float("nan"), float("nan"), float("nan"), 0)
    path = tmp_path / "scan.pcd"
    path.write_bytes((HEADER + "binary\n").encode() + b"".join(rows))
    assert load_cloud(path).tolist() == POINTS[[0, 1, 3]].tolist()
    path.write_bytes((HEADER + "binary\n").encode() + b"".join(rows)[:-1])
    with pytest.raises(InputError, match="ends before its 4 points"):
        load_cloud(path)
    path.write_bytes((HEADER + "binary_packed\n").encode())
    with pytest.raises(InputError, match="holds binary_packed data, not ascii"):
        load_cloud(path)
    path.write_text("hello\n")
    with pytest.raises(InputError, match="no PCD file"):
        load_cloud(path)


def lzf_packed(data: bytes) -> bytes:
    """Pack by the rules of LibLZF: the last place of every three bytes is the only candidate."""
    packed, literals, places, at = bytearray(), bytearray(), {}, 0

    def flush() -> None:
        for start in range(0, len(literals), 32):
            run = literals[start : start + 32]
            packed.append(len(run) - 1)
            packed.extend(run)
        literals.clear()

    while at < len(data):
        found = places.get(data[at : at + 3], -1)
        places[data[at : at + 3]] = at
        if found < 0 or at - found > 8192 or at + 3 > len(data):
            literals.append(data[at])
            at += 1
            continue
        flush()
        length = 3
        while length < 264 and at + length < len(data):
            if data[found + length] != data[at + length]:
                break
            length += 1
        distance, code = at - found - 1, length - 2
        packed.append(min(code, 7) << 5 | distance >> 8)
        if code >= 7:
            packed.append(code - 7)
        packed.append(distance & 255)
        at += length
    flush()
    return bytes(packed)


def compressed(columns: bytes) -> bytes:
    packed = lzf_packed(columns)
    return struct.pack("<II", len(packed), len(columns)) + packed


def test_compressed_pcd_holds_field_after_field(tmp_path: Path) -> None:
    path = tmp_path / "scan.pcd"
    columns = POINTS.T.tobytes() + bytes([7, 7, 9, 7])  # x of all, y of all, z of all, i of all
    body = compressed(columns)
    path.write_bytes((HEADER + "binary_compressed\n").encode() + body)
    assert load_cloud(path).tolist() == POINTS.tolist()
    # Fields of several values, and in another order.
    text = "VERSION .7\nFIELDS n z y x\nSIZE 4 8 8 8\nTYPE I F F F\nCOUNT 3 1 1 1\nPOINTS 400\n"
    wide = np.random.default_rng(0).integers(0, 9, size=(400, 3)).astype(np.float64)
    numbers = np.arange(1200, dtype="<i4").tobytes()
    whole = numbers + wide[:, 2].tobytes() + wide[:, 1].tobytes() + wide[:, 0].tobytes()
    body = compressed(whole)
    assert len(body) < len(whole) / 2  # long and short repetitions, near and far
    path.write_bytes((text + "DATA binary_compressed\n").encode() + body)
    assert load_cloud(path).tolist() == wide.tolist()


def test_damaged_compressed_pcd_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.pcd"
    columns = POINTS.T.tobytes() + bytes(4)
    body = compressed(columns)
    start = (HEADER + "binary_compressed\n").encode()
    sized = struct.pack("<II", len(body) - 8, 52)
    for damaged, message in (
        (b"", "ends before its data"),
        (body[:-1], "announces"),
        (struct.pack("<II", len(body) - 8, 51) + body[8:], "its points need 52"),
        (struct.pack("<II", len(body) - 10, 52) + body[8:], "damaged"),
        (sized + b"\x20\x00" + body[10:], "refer to before their beginning"),
    ):
        path.write_bytes(start + damaged)
        with pytest.raises(InputError, match=message):
            load_cloud(path)


@pytest.mark.parametrize(
    ("packed", "data"),
    [
        (b"\x02abc", b"abc"),
        (b"\x00a\x20\x00", b"aaaa"),  # one byte, then three from one before: runs into itself
        (b"\x01ab\xe0\x01\x01", b"ab" * 6),  # 7 + 1 + 2 bytes from two before
        (b"\x03abcd\x40\x03", b"abcdabcd"),
    ],
)
def test_lzf_by_hand(packed: bytes, data: bytes) -> None:
    assert lzf_unpacked(packed, len(data)) == data
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(ValueError, match="unpack to"):
            lzf_unpacked(packed, size)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"\x03abc", "within a run"),
        (b"\x00a\x20", "within a reference"),
        (b"\x00a\xe0\x05", "within a reference"),
        (b"\x00a\x20\x01", "before their beginning"),
        (b"\x00a" + b"\xe0\xff\x00" * 1000, "more than 9 bytes"),
    ],
)
def test_lzf_that_is_damaged(packed: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lzf_unpacked(packed, 9)


@given(st.binary(max_size=700), st.integers(1, 5))
def test_what_was_packed_is_unpacked(data: bytes, repeats: int) -> None:
    assert lzf_unpacked(lzf_packed(data * repeats), len(data) * repeats) == data * repeats


@given(st.binary(max_size=60), st.integers(0, 80))
def test_no_bytes_unpack_to_anything_but_their_size(packed: bytes, size: int) -> None:
    result = None
    with contextlib.suppress(ValueError):
        result = lzf_unpacked(packed, size)
    assert result is None or len(result) == size


def test_meshes_are_sampled_evenly_by_area(tmp_path: Path) -> None:
    pytest.importorskip("trimesh")
    path = tmp_path / "two.off"  # two squares, one of them nine times as large
    path.write_text("OFF\n8 4 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n5 0 0\n8 0 0\n8 3 0\n5 3 0\n")
    with path.open("a") as stream:
        stream.write("3 0 1 2\n3 0 2 3\n3 4 5 6\n3 4 6 7\n")
    cloud = load_cloud(path, 2000, seed=1)
    assert cloud.shape == (2000, 3)
    share = float((cloud[:, 0] < 2).double().mean())
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / 2000) ** 0.5
    assert torch.equal(cloud, load_cloud(path, 2000, seed=1))
    assert not torch.equal(cloud, load_cloud(path, 2000, seed=2))


def test_resampling_repeats_nothing_while_there_is_enough() -> None:
    cloud = torch.arange(30.0).view(10, 3)
    some = resampled(cloud, 7, seed=4)
    assert len(set(some[:, 0].tolist())) == 7
    more = resampled(cloud, 25)
    assert more[:, 0].unique(return_counts=True)[1].tolist().count(3) == 5
    with pytest.raises(InputError):
        resampled(cloud, 0)


def test_bad_clouds_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_cloud(tmp_path / "nothing.npy")
    (tmp_path / "cloud.doc").write_text("x")
    with pytest.raises(InputError, match="unknown kind"):
        load_cloud(tmp_path / "cloud.doc")
    for name in ("bad.npy", "bad.npy.gz", "bad.xyz"):
        (tmp_path / name).write_bytes(b"\x93 not a number")
        with pytest.raises(InputError, match=r"cannot be read.*copy it again"):
            load_cloud(tmp_path / name)
    np.save(tmp_path / "flat.npy", np.zeros(5))
    with pytest.raises(InputError, match="not a cloud"):
        load_cloud(tmp_path / "flat.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        load_cloud(tmp_path / "objects.npy")
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    with pytest.raises(NonFiniteError, match="4 points"):
        load_cloud(tmp_path / "nan.npy")


def test_modelnet_style_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    data = np.random.default_rng(0).normal(size=(6, 20, 3)).astype(np.float32)
    for part in (0, 1):
        with h5py.File(tmp_path / f"train{part}.h5", "w") as file:
            file["data"] = data[3 * part : 3 * part + 3]
            file["label"] = np.array([[0], [1], [2]], dtype=np.uint8)
    files = [tmp_path / "train0.h5", tmp_path / "train1.h5"]
    clouds = load_hdf5(files, points=8)
    assert torch.equal(clouds.points, torch.from_numpy(data[:, :8]))
    assert clouds.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert clouds.classes == ("0", "1", "2")
    (tmp_path / "shape_names.txt").write_text("bed\nchair\ndesk\n")
    assert load_hdf5(files).classes == ("bed", "chair", "desk")
    with pytest.raises(InputError, match="ask for fewer"):
        load_hdf5(files, points=50)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["pixels"] = data
    with pytest.raises(InputError, match="holds pixels"):
        load_hdf5([tmp_path / "other.h5"])
    with pytest.raises(InputError, match="cannot be read"):
        load_hdf5([tmp_path / "missing.h5"])
    with pytest.raises(InputError, match="no HDF5 file"):
        load_hdf5([])


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(MissingDependency, match=r"cmd-plugin\[points\]"):
        load_hdf5([tmp_path / "a.h5"])


def test_voxels_become_clouds_of_their_surface(tmp_path: Path) -> None:
    grid = np.zeros((3, 1, 8, 8, 8))
    grid[1, 0, 1:6, 1:6, 1:4] = 1.0
    grid[2, 0, :, 0, 0] = 1.0
    np.save(tmp_path / "voxels.npy", grid)
    grids = load_voxels(tmp_path / "voxels.npy")
    assert grids.shape == (2, 8, 8, 8)  # the empty one is left out
    clouds = voxel_clouds(grids, 500, seed=2)
    assert clouds.shape == (2, 500, 3)
    assert float(clouds.norm(dim=2).amax()) == pytest.approx(1.0)
    assert torch.equal(voxel_clouds(grids[:1], 500, seed=2)[0], clouds[0])
    extent = clouds[0].amax(dim=0) - clouds[0].amin(dim=0)
    # 5 x 5 x 3 voxels: with the last two axes exchanged, the second is the short one.
    assert extent[1] / extent[0] == pytest.approx(3 / 5, abs=0.03)
    assert extent[2] / extent[0] == pytest.approx(1.0, abs=0.03)
    centre = clouds[0] - (clouds[0].amax(dim=0) + clouds[0].amin(dim=0)) / 2
    assert (centre.abs() / (extent / 2) > 0.33).any(dim=1).all()  # nothing from the inside
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    with pytest.raises(InputError, match="not voxel grids"):
        load_voxels(tmp_path / "flat.npy")
    with pytest.raises(InputError, match="no file"):
        load_voxels(tmp_path / "none.npy")
