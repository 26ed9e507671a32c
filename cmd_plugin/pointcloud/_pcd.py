"""The PCD format of the Point Cloud Library: ascii and binary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.errors import InputError

__all__ = ["read_pcd"]

_TYPES = {"F": "f", "U": "u", "I": "i"}


def read_pcd(path: Path) -> NDArray[Any]:
    """Read the fields x, y, z of a PCD file, [N, 3] float64; points that are all NaN are left out.

    (PCD marks missing points of an organised scan by NaN.)

    Raises:
        InputError: If the header is damaged, a field is missing, or the data are compressed.
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
    elif kind == "binary":
        record = np.dtype(
            [
                (f"{name}{number}", f"<{_TYPES[of]}{size}", (count,))
                for number, (name, of, size, count) in enumerate(
                    zip(fields, header["TYPE"], header["SIZE"], counts, strict=True)
                )
            ]
        )
        if len(body) < total * record.itemsize:
            raise InputError(f"{path} ends before its {total} points: copy it again.")
        rows = np.frombuffer(body, dtype=record, count=total)
        names = [f"{axis}{fields.index(axis)}" for axis in ("x", "y", "z")]
        cloud = np.stack([rows[name][:, 0] for name in names], axis=1).astype(np.float64)
    else:
        raise InputError(
            f"{path} holds {kind} data: convert it by pcl_convert_pcd_ascii_binary FILE OUT 1."
        )
    if len(cloud) != total:
        raise InputError(f"{path} holds {len(cloud)} of its {total} points: copy it again.")
    return cloud[~np.isnan(cloud).all(axis=1)]


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
