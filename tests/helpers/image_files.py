"""Small image files, and folders and archives of them."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(
    value: int, mode: str = "L", size: tuple[int, int] = (6, 4), kind: str = "PNG"
) -> bytes:
    """An image of one brightness; `size` is width and height."""
    stream = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(stream, kind)
    return stream.getvalue()


def noise(seed: int, kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """An image that does not compress, in colour."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    return stream.getvalue()


def tree(**counts: int) -> dict[str, bytes]:
    """Files of a collection: `train_cat=3` makes train/cat/0.png ... with brightness 0, 1, 2."""
    return {
        f"{name.replace('_', '/')}/{index}.png": encoded(index)
        for name, count in counts.items()
        for index in range(count)
    }


def to_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def to_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def to_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tiff(
    data: bytes,
    size: tuple[int, int],
    bits: int,
    sample_format: int = 1,
    *,
    white_is_zero: bool = False,
    big_endian: bool = False,
    tile: tuple[int, int] | None = None,
) -> bytes:
    """A grey TIFF of one strip (or tile), written by hand; `size` is width and height.

    `sample_format` is 1 for unsigned, 2 for signed integers and 3 for floats.
    """
    order = ">" if big_endian else "<"
    place = (322, 323, 324, 325) if tile else (None, 278, 273, 279)
    width, length = tile or (0, size[1])
    fields = {
        256: size[0],
        257: size[1],
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        277: 1,
        339: sample_format,
        place[1]: length,
        place[3]: len(data),
    }
    if tile:
        fields[place[0]] = width
    start = 8 + 2 + 12 * (len(fields) + 1) + 4
    fields[place[2]] = start
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(fields.items())
    )
    mark = b"MM" if big_endian else b"II"
    head = mark + struct.pack(f"{order}HIH", 42, 8, len(fields))
    return head + entries + b"\0\0\0\0" + data
