"""The PCD format of the Point Cloud Library: ascii, binary and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.errors import InputError

__all__ = ["lzf_unpacked", "read_pcd"]

_TYPES = {"F": "f", "U": "u", "I": "i"}


def read_pcd(path: Path) -> NDArray[Any]:
    """Read the fields x, y, z of a PCD file, [N, 3] float64; points that are all NaN are left out.

    (PCD marks missing points of an organised scan by NaN.)

    Raises:
        InputError: If the header or the data are damaged, or a field is missing.
    """
    raw = path.read_bytes()
    header, body = _split(path, raw)
    fields, counts = header["FIELDS"], [int(c) for c in header.get("COUNT", [])]
    counts = counts or [1] * len(fields)
    missing = {"x", "y", "z"} - set(fields)
    if missing:
        raise InputError(f"{path} has no field {', '.join(sorted(missing))}.")
    total = int(header["POINTS"][0])
    columns = np.cumsum([0, *counts])
    where = [int(columns[fields.index(axis)]) for axis in ("x", "y", "z")]
    kind = header["DATA"][0].lower()
    if kind == "ascii":
        table = np.loadtxt(body.decode("ascii").splitlines()[:total], ndmin=2)
        cloud = table[:, where]
    elif kind in ("binary", "binary_compressed"):
        record = np.dtype(
            [
                (f"{name}{number}", f"<{_TYPES[of]}{size}", (count,))
                for number, (name, of, size, count) in enumerate(
                    zip(fields, header["TYPE"], header["SIZE"], counts, strict=True)
                )
            ]
        )
        if kind == "binary_compressed":
            body = _row_by_row(_unpacked(path, body, total * record.itemsize), record, total)
        if len(body) < total * record.itemsize:
            raise InputError(f"{path} ends before its {total} points: copy it again.")
        rows = np.frombuffer(body, dtype=record, count=total)
        names = [f"{axis}{fields.index(axis)}" for axis in ("x", "y", "z")]
        cloud = np.stack([rows[name][:, 0] for name in names], axis=1).astype(np.float64)
    else:
        raise InputError(
            f"{path} holds {kind} data, not ascii, binary or binary_compressed: copy it again."
        )
    if len(cloud) != total:
        raise InputError(f"{path} holds {len(cloud)} of its {total} points: copy it again.")
    return cloud[~np.isnan(cloud).all(axis=1)]


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


def _row_by_row(columns: bytes, record: np.dtype[Any], total: int) -> bytes:
    """Compressed files hold field after field of all points: put them point after point."""
    rows = np.empty(total, dtype=record)
    start = 0
    for name in record.names or ():
        field = rows[name]
        rows[name] = np.frombuffer(columns, field.dtype, field.size, start).reshape(field.shape)
        start += field.nbytes
    return rows.tobytes()


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
