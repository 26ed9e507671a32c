"""The PLY format: vertices and faces, ascii or binary."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.errors import InputError

__all__ = ["fans", "read_ply"]

Array = NDArray[Any]

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
}
_TYPES |= {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"}
_TYPES |= {"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_INDICES = ("vertex_indices", "vertex_index")
_NUMBER = re.compile(r"[0-9]{1,12}")


@dataclass
class _Element:
    """What a header says of one kind of thing.

    Attributes:
        name: ``vertex``, ``face`` or another.
        count: How many there are.
        properties: Of each its name, the type of a value, and, if it is a list, of its length.
    """

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)


class _Body:
    """The data behind a header: bytes, or, of ascii files, numbers.

    Args:
        raw: The bytes.
        order: ``<`` or ``>`` of binary data; empty for ascii.
    """

    def __init__(self, raw: bytes, order: str) -> None:
        self.order = order
        self.content: Array = np.frombuffer(raw, np.uint8)
        if not order:
            self.content = np.array(raw.split(), dtype=np.bytes_).astype(np.float64)
        self.place = 0

    def rows(self, layout: list[tuple[str, int]], count: int) -> list[Array] | None:
        """So many rows from here on; None if they are not there.

        Args:
            layout: Type and number of values that stand beside one another, for each column.
            count: Number of rows.

        Returns:
            [count, values] of each column.
        """
        sizes = [n * (int(kind[1]) if self.order else 1) for kind, n in layout]
        total = sum(sizes)
        if count * total > len(self.content) - self.place:
            return None
        table = self.content[self.place : self.place + count * total].reshape(count, total)
        ends = np.cumsum([0, *sizes]).tolist()
        columns = [table[:, ends[i] : ends[i + 1]] for i in range(len(layout))]
        if self.order:
            columns = [
                np.ascontiguousarray(column).view(self.order + kind)
                if n
                else np.empty((count, 0), kind)
                for column, (kind, n) in zip(columns, layout, strict=True)
            ]
        self.place += count * total
        return columns


def read_ply(path: Path) -> tuple[Array, Array]:
    """Read vertices [V, 3] float64 and triangles [F, 3] int64 of a PLY file.

    Faces with more corners become fans of triangles; what else there is is passed over.

    Raises:
        InputError: If it is damaged or cut off, or holds its triangles as strips.
        ValueError: If a word of ascii data is no number.
    """
    order, elements, raw = _header(path, path.read_bytes())
    names = [element.name for element in elements]
    if names.count("vertex") != 1 or names.count("face") > 1:
        raise InputError(f"{path} has not exactly one list of vertices: make it again.")
    if any(e.count and e.name.startswith("tristrip") for e in elements):
        raise InputError(
            f"{path} holds its triangles as strips, which are not read: save it with faces."
        )
    body = _Body(raw, order)
    vertices: Array = np.empty((0, 3))
    triangles: Array = np.empty((0, 3), np.int64)
    for element in elements:
        if element.count == 0:
            continue
        if element.name not in ("vertex", "face") and len(vertices) and "face" not in names:
            break
        columns = _columns(path, element, body)
        if element.name == "vertex":
            wrong = [axis for axis in "xyz" if not isinstance(columns.get(axis), np.ndarray)]
            if wrong:
                raise InputError(f"{path} has no {', '.join(wrong)} of its vertices.")
            vertices = np.stack([columns[axis] for axis in "xyz"], axis=1).astype(np.float64)
        elif element.name == "face":
            found = (columns.get(name) for name in _INDICES)
            lists = [values for values in found if isinstance(values, list)]
            if not lists:
                raise InputError(f"{path} has faces without a list of {' or '.join(_INDICES)}.")
            triangles = fans(path, lists[0])
            break
    return vertices, triangles


def fans(path: Path, polygons: list[Array]) -> Array:
    """Triangles [F, 3] int64 of polygons, given as tables [count, corners] of indices.

    Raises:
        InputError: If an index is no whole number.
    """
    pieces: list[Array] = [np.empty((0, 3), np.int64)]
    for table in polygons:
        whole = table.astype(np.int64) if table.dtype.kind != "f" else _whole(path, table)
        pieces += [whole[:, (0, corner - 1, corner)] for corner in range(2, whole.shape[1])]
    return np.concatenate(pieces)


def _whole(path: Path, table: Array) -> Array:
    if not (np.isfinite(table).all() and (np.abs(table) < 2**53).all()):
        raise InputError(f"{path} has a face whose corners are no numbers of vertices: copy it.")
    whole: Array = table.astype(np.int64)
    if (whole != table).any():
        raise InputError(f"{path} has a face whose corners are no numbers of vertices: copy it.")
    return whole


def _columns(path: Path, element: _Element, body: _Body) -> dict[str, Array | list[Array]]:
    """Values of each property: [count], or, of lists, tables [rows, length] in the file's order."""
    scalars: dict[str, list[Array]] = {}
    lists: dict[str, list[Array]] = {}
    done, ahead = 0, element.count
    while done < element.count:
        start = body.place
        layout = _layout(path, element, body)
        body.place = start
        # Rows are read as if all lists were as long as the first row's, as far as that is true.
        columns = body.rows(layout, min(ahead, element.count - done))
        if columns is None:
            if ahead == 1:
                raise _cut_off(path, element)
            ahead = max(1, ahead // 2)
            continue
        good, position = len(columns[0]) if columns else element.count, 0
        for _, _, counted in element.properties:
            if counted is not None:
                same = columns[position][:, 0] == columns[position][0, 0]
                good = min(good, len(same) if same.all() else int(same.argmin()))
            position += 1 if counted is None else 2
        if columns and good < len(columns[0]):
            body.place = start
            body.rows(layout, good)
            ahead = 1
        else:
            ahead *= 2
        position = 0
        for name, _, counted in element.properties:
            if counted is None:
                scalars.setdefault(name, []).append(columns[position][:good, 0])
                position += 1
            else:
                lists.setdefault(name, []).append(columns[position + 1][:good])
                position += 2
        done += good
    return {**{name: np.concatenate(parts) for name, parts in scalars.items()}, **lists}


def _layout(path: Path, element: _Element, body: _Body) -> list[tuple[str, int]]:
    """Types and numbers of the values in the row that comes next."""
    layout: list[tuple[str, int]] = []
    for _, kind, counted in element.properties:
        if counted is None:
            piece = [(kind, 1)]
        else:
            read = body.rows([(counted, 1)], 1)
            if read is None:
                raise _cut_off(path, element)
            length = float(read[0][0, 0])
            if not (0 <= length <= len(body.content)) or length != int(length):
                raise InputError(
                    f"{path} has a list of {length:g} values in {element.name}: copy it again."
                )
            layout.append((counted, 1))
            piece = [(kind, int(length))]
        if body.rows(piece, 1) is None:
            raise _cut_off(path, element)
        layout += piece
    return layout


def _cut_off(path: Path, element: _Element) -> InputError:
    return InputError(f"{path} ends before its {element.count} {element.name}s: copy it again.")


def _header(path: Path, raw: bytes) -> tuple[str, list[_Element], bytes]:
    order: str | None = None
    elements: list[_Element] = []
    start = 0
    while start < len(raw):
        end = raw.find(b"\n", start)
        end = len(raw) if end < 0 else end
        line = raw[start:end].decode("ascii", errors="replace")
        words = line.split()
        first, start = start == 0, end + 1
        if first and line.strip() != "ply":
            break
        if first or not words or words[0] in ("comment", "obj_info"):
            continue
        if words == ["end_header"]:
            if order is None or not all(element.properties for element in elements):
                break
            return order, elements, raw[start:]
        known = {"format": 3, "element": 3, "property": 5 if "list" in words else 3}
        if len(words) != known.get(words[0]):
            break
        if words[0] == "format":
            order = _ORDERS.get(words[1])
        elif words[0] == "element" and _NUMBER.fullmatch(words[2]):
            elements.append(_Element(words[1], int(words[2])))
        elif words[0] == "property" and elements:
            *types, name = words[1:]
            kinds = [_TYPES.get(word) for word in types if word != "list"]
            taken = any(name == other for other, _, _ in elements[-1].properties)
            if taken or None in kinds or (len(kinds) == 2 and str(kinds[0])[0] == "f"):
                break
            elements[-1].properties.append(
                (name, str(kinds[-1]), str(kinds[0]) if len(kinds) == 2 else None)
            )
        else:
            break
    raise InputError(f"{path} is no PLY file, or its header is damaged: make or copy it again.")
