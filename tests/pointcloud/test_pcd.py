"""PCD headers that no file can have are refused; what stands beside x, y, z does no harm."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud.files import load_cloud
from tests.helpers.sentences import assert_one_sentence

HEADER = {
    "VERSION": ".7",
    "FIELDS": "x y z",
    "SIZE": "4 4 4",
    "TYPE": "F F F",
    "COUNT": "1 1 1",
    "WIDTH": "2",
    "HEIGHT": "1",
    "POINTS": "2",
    "DATA": "ascii",
}
BODY = b"1 2 3\n4 5 6\n"


def write(folder: Path, body: bytes, **changes: str | None) -> Path:
    header = {name: value for name, value in {**HEADER, **changes}.items() if value is not None}
    path = folder / "a.pcd"
    path.write_bytes("".join(f"{k} {v}\n" for k, v in header.items()).encode() + body)
    return path


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"SIZE": "3 4 4"}, "SIZE 3"),
        ({"TYPE": "X F F"}, "TYPE X"),
        ({"TYPE": "F F F", "SIZE": "2 4 4"}, "SIZE 2"),
        ({"COUNT": "0 1 1"}, "COUNT 0"),
        ({"COUNT": "2 1 1"}, "several x, y or z"),
        ({"COUNT": "1 1"}, "equally many"),
        ({"SIZE": "4 4"}, "equally many"),
        ({"FIELDS": "x y"}, "equally many"),
        ({"FIELDS": "x y w"}, "no field z"),
        ({"FIELDS": "x x z"}, "no field y"),
        ({"FIELDS": "x y z x", "SIZE": "4 4 4 4", "TYPE": "F F F F", "COUNT": None}, "more than"),
        ({"POINTS": ""}, "POINTS in its header"),
        ({"POINTS": "-2"}, "POINTS in its header"),
        ({"POINTS": "1e3"}, "POINTS in its header"),
        ({"POINTS": "9" * 5000}, "POINTS in its header"),
        ({"POINTS": "0", "WIDTH": "0"}, "holds no points"),
        ({"POINTS": "3"}, "3 points and 2 x 1"),
        ({"POINTS": "3", "WIDTH": None}, "2 of its 3 points"),
        ({"DATA": ""}, "unnamed data"),
        ({"DATA": "binary"}, "ends before its 2 points"),
        ({"DATA": "binary", "POINTS": "999999999999", "WIDTH": None}, "ends before"),
        ({"FIELDS": "x y z w", "SIZE": "4 4 4 4", "TYPE": "F F F F", "COUNT": None}, "3 numbers"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    changes: dict[str, str | None], why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load_cloud(write(tmp_path, BODY, **changes))
    assert_one_sentence(caught.value, "a.pcd", why)


@pytest.mark.parametrize(
    "body", [b"1 2\n4 5\n", b"1 2 3\n4 5\n", b"1 2 3\n4 5 # 6\n", b"1 2 3\n\xff\n"]
)
def test_rows_that_do_not_fit_are_refused(body: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_cloud(write(tmp_path, body))


def test_fields_of_all_types_beside_the_coordinates(tmp_path: Path) -> None:
    fields = {"FIELDS": "n z _ y x", "SIZE": "2 8 1 4 2", "TYPE": "U F I F I", "COUNT": "3 1 5 1 1"}
    rows = [(7, 8, 9, 1.5, *range(5), -2.5, -3), (0, 0, 0, 4.0, *range(5), 5.0, 6)]
    body = b"".join(struct.pack("<3Hd5bfh", *row) for row in rows)
    path = write(tmp_path, body, DATA="binary", **fields)
    assert load_cloud(path).tolist() == [[-3.0, -2.5, 1.5], [6.0, 5.0, 4.0]]
    text = "\n".join(" ".join(map(str, row)) for row in rows).encode()
    assert load_cloud(write(tmp_path, b"\n" + text, **fields)).tolist() == load_cloud(path).tolist()
