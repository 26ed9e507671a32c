"""The PCD format of the Point Cloud Library: ascii, binary and compressed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.errors import InputError

__all__ = ["lzf_unpacked", "read_pcd"]

_AXES = ("x", "y", "z")
_NUMBER = re.compile(r"[0-9]{1,12}")
_DTYPES = {
    **{("F", size): f"<f{size}" for size in (4, 8)},
    **{("U", size): f"<u{size}" for size in (1, 2, 4, 8)},
    **{("I", size): f"<i{size}" for size in (1, 2, 4, 8)},
}


@dataclass(frozen=True)
class _Header:
    """What a header says, checked.

    Attributes:
        points: Number of points.
        kind: ascii, binary or binary_compressed.
        row_bytes: Bytes of a point.
        row_words: Numbers of a point.
        dtypes: Of x, y and z.
        bytes_before: In a point, before x, y and z.
        words_before: The same in numbers.
    """

    points: int
    kind: str
    row_bytes: int
    row_words: int
    dtypes: tuple[str, ...]
    bytes_before: tuple[int, ...]
    words_before: tuple[int, ...]


def read_pcd(path: Path) -> NDArray[Any]:
    """Read the fields x, y, z of a PCD file, [N, 3] float64; points that are all NaN are left out.

    (PCD marks missing points of an organised scan by NaN.)

    Raises:
        InputError: If the header or the data are damaged, or a field is missing.
        ValueError: If a line of ascii data holds something else than numbers.
    """
    entries, body = _split(path, path.read_bytes())
    header = _checked(path, entries)
    cloud = _READERS[header.kind](path, header, body)
    kept: NDArray[Any] = cloud[~np.isnan(cloud).all(axis=1)]
    return kept


def _read_ascii(path: Path, header: _Header, body: bytes) -> NDArray[Any]:
    lines = [line for line in body.decode("ascii").splitlines() if line.strip()][: header.points]
    if len(lines) != header.points:
        raise InputError(f"{path} holds {len(lines)} of its {header.points} points: copy it again.")
    table = np.loadtxt(lines, comments=None, ndmin=2)
    if table.shape[1] != header.row_words:
        raise InputError(
            f"{path} has {table.shape[1]} numbers a line, but its header says {header.row_words}: "
            "make it again."
        )
    return table[:, header.words_before]


def _read_binary(path: Path, header: _Header, body: bytes) -> NDArray[Any]:
    size = header.points * header.row_bytes
    if len(body) < size:
        raise InputError(f"{path} ends before its {header.points} points: copy it again.")
    rows = np.frombuffer(body, np.uint8, size).reshape(header.points, header.row_bytes)
    columns = [
        np.ascontiguousarray(rows[:, before : before + np.dtype(kind).itemsize]).view(kind)[:, 0]
        for kind, before in zip(header.dtypes, header.bytes_before, strict=True)
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def _read_compressed(path: Path, header: _Header, body: bytes) -> NDArray[Any]:
    """Compressed files hold field after field of all points."""
    columns = _unpacked(path, body, header.points * header.row_bytes)
    return np.stack(
        [
            np.frombuffer(columns, kind, header.points, before * header.points)
            for kind, before in zip(header.dtypes, header.bytes_before, strict=True)
        ],
        axis=1,
    ).astype(np.float64)


_READERS = {
    "ascii": _read_ascii,
    "binary": _read_binary,
    "binary_compressed": _read_compressed,
}


def _unpacked(path: Path, body: bytes, expected: int) -> bytes:
    """The data behind the two sizes that begin a compressed body."""
    if len(body) < 8:
        raise InputError(f"{path} ends before its data: copy it again.")
    packed, size = (int(n) for n in np.frombuffer(body, "<u4", 2))
    if size != expected or packed > len(body) - 8:
        raise InputError(
            f"{path} announces {packed} bytes that unpack to {size}; it has {len(body) - 8}, and "
            f"its points need {expected}: copy it again."
        )
    try:
        return lzf_unpacked(body[8 : 8 + packed], size)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): copy it again.") from error


def lzf_unpacked(packed: bytes, size: int) -> bytes:
    """Unpack what LibLZF packed.

    A byte below 32 announces so many literal bytes and one more. Any other holds a length in its
    upper three bits (7: the next byte adds to it) and, with the byte after that, a distance; so
    many bytes and two more are repeated from there, and may run into what they write.

    Args:
        packed: The stream.
        size: Number of bytes it must unpack to.

    Raises:
        ValueError: If it ends too early, refers to before its beginning, or has another size.
    """
    result, place, end = bytearray(), 0, len(packed)
    while place < end:
        control = packed[place]
        place += 1
        if control < 32:
            length = control + 1
            if place + length > end:
                raise ValueError("the packed data end within a run of bytes")
            result += packed[place : place + length]
            place += length
        else:
            length = control >> 5
            further = 2 if length == 7 else 1
            if place + further > end:
                raise ValueError("the packed data end within a reference")
            if length == 7:
                length += packed[place]
            length += 2
            distance = ((control & 31) << 8 | packed[place + further - 1]) + 1
            place += further
            if distance > len(result):
                raise ValueError("the packed data refer to before their beginning")
            piece = bytes(result[-distance : len(result) - distance + length])
            result += (piece * (length // distance + 1))[:length] if distance < length else piece
        if len(result) > size:
            raise ValueError(f"the data unpack to more than {size} bytes")
    if len(result) != size:
        raise ValueError(f"the data unpack to {len(result)} of {size} bytes")
    return bytes(result)


def _split(path: Path, raw: bytes) -> tuple[dict[str, list[str]], bytes]:
    header: dict[str, list[str]] = {}
    start = 0
    while start < len(raw):
        end = raw.find(b"\n", start)
        end = len(raw) if end < 0 else end
        words = raw[start:end].decode("ascii", errors="replace").split()
        start = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
            if words[0].upper() == "DATA":
                break
    missing = {"FIELDS", "SIZE", "TYPE", "POINTS", "DATA"} - set(header)
    if missing:
        raise InputError(f"{path} is no PCD file: its header lacks {', '.join(sorted(missing))}.")
    return header, raw[start:]


def _checked(path: Path, entries: dict[str, list[str]]) -> _Header:
    fields, types = entries["FIELDS"], entries["TYPE"]
    sizes = _numbers(path, entries, "SIZE")
    counts = _numbers(path, entries, "COUNT") if "COUNT" in entries else [1] * len(fields)
    if not len(fields) == len(types) == len(sizes) == len(counts):
        raise InputError(
            f"{path}: its header has {len(fields)} fields, {len(sizes)} sizes, {len(types)} types "
            f"and {len(counts)} counts, which must be equally many: make it again."
        )
    for field, kind, size, count in zip(fields, types, sizes, counts, strict=True):
        if (kind, size) not in _DTYPES or count < 1:
            raise InputError(
                f"{path}: its field {field} has TYPE {kind}, SIZE {size} and COUNT {count}, which "
                "no PCD file can have: make it again."
            )
    wrong = [axis for axis in _AXES if fields.count(axis) != 1]
    if wrong:
        missing = [axis for axis in wrong if axis not in fields]
        raise InputError(
            f"{path} has {'no' if missing else 'more than one'} field {', '.join(missing or wrong)}"
            ": give a file with one x, y and z."
        )
    where = [fields.index(axis) for axis in _AXES]
    if any(counts[place] != 1 for place in where):
        raise InputError(f"{path} has several x, y or z a point: give a file with one of each.")
    points = _one_number(path, entries, "POINTS")
    if "WIDTH" in entries and "HEIGHT" in entries:
        width, height = (_one_number(path, entries, name) for name in ("WIDTH", "HEIGHT"))
        if width * height != points:
            raise InputError(
                f"{path} says that it has {points} points and {width} x {height}: make it again."
            )
    if points == 0:
        raise InputError(f"{path} holds no points: make it again.")
    kind = " ".join(entries["DATA"]).lower()
    if kind not in _READERS:
        raise InputError(
            f"{path} holds {kind or 'unnamed'} data, not ascii, binary or binary_compressed: copy "
            "it again."
        )
    lengths = [size * count for size, count in zip(sizes, counts, strict=True)]
    return _Header(
        points,
        kind,
        row_bytes=sum(lengths),
        row_words=sum(counts),
        dtypes=tuple(_DTYPES[types[place], sizes[place]] for place in where),
        bytes_before=tuple(sum(lengths[:place]) for place in where),
        words_before=tuple(sum(counts[:place]) for place in where),
    )


def _numbers(path: Path, entries: dict[str, list[str]], name: str) -> list[int]:
    words = entries[name]
    if not words or not all(map(_NUMBER.fullmatch, words)):
        raise InputError(
            f"{path}: {name} in its header is {' '.join(words)[:60]!r}, not whole numbers: make it "
            "again."
        )
    return [int(word) for word in words]


def _one_number(path: Path, entries: dict[str, list[str]], name: str) -> int:
    return _numbers(path, entries, name)[0]
