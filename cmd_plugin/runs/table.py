"""A table that grows row by row on disk, and stays readable when a process is killed."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import read_json, unwritable, write_atomically, write_json

__all__ = ["Table"]

_ADVICE = "start again with --overwrite"


class Table:
    """Rows of a CSV file, typed by column.

    Floats are written with all their digits. A row that a kill cut short is not there. With a seal,
    a small file with the length and the checksum of what was written, a table that changed behind
    our back is noticed as well.

    Args:
        path: The file; made with its header when the first rows come.
        columns: Name -> type (``int``, ``float`` or ``str``) of each column.
        seal: Where the seal lies; None for a table that only one process ever writes.
    """

    def __init__(
        self, path: Path, columns: Mapping[str, Callable[[str], Any]], seal: Path | None = None
    ) -> None:
        self.path = path
        self.columns = dict(columns)
        self.seal = seal
        self._sealed: tuple[int, int] | None = None  # bytes, checksum; None until first looked at

    def append(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add rows.

        Raises:
            InputError: If they cannot be written, or what is there is damaged.
        """
        if not self.path.exists():
            self.replace(rows)
            return
        if self._sealed is None:
            self.replace(self.rows())  # cuts off what a kill left unfinished
        data = _encoded(rows)
        with unwritable(self.path), self.path.open("ab") as stream:
            stream.write(data)
        length, checksum = self._sealed or (0, 0)
        self._close(length + len(data), zlib.crc32(data, checksum))

    def replace(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write the whole table anew, in one step.

        Raises:
            InputError: If it cannot be written.
        """
        data = _encoded([list(self.columns), *rows])
        if self.seal is not None:
            self.seal.unlink(missing_ok=True)  # no seal is no lie, a seal of the table before is
        write_atomically(self.path, lambda path: path.write_bytes(data))
        self._close(len(data), zlib.crc32(data))

    def rows(self) -> list[tuple[Any, ...]]:
        """Return all complete rows, in the order they were written.

        Raises:
            InputError: If the file is damaged.
        """
        if not self.path.exists():
            if self.seal is not None and self.seal.exists():
                raise InputError(f"{self.path} was removed: {_ADVICE}.")
            return []
        try:
            text = self._read().decode("utf-8")
            header, *rows = csv.reader(io.StringIO(text, newline=""))
            if header != list(self.columns):
                raise ValueError(f"its columns are {', '.join(header)}")
            kinds = self.columns.values()
            return [
                tuple(kind(cell) for kind, cell in zip(kinds, row, strict=True)) for row in rows
            ]
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{self.path} is damaged ({error}): {_ADVICE}.") from error

    def _read(self) -> bytes:
        data = self.path.read_bytes()
        if self.seal is None or not self.seal.exists():
            return data[: data.rfind(b"\n") + 1]
        seal = read_json(self.seal, _ADVICE)
        length, checksum = seal.get("bytes"), seal.get("crc32")
        if not isinstance(length, int) or zlib.crc32(data[:length]) != checksum:
            raise ValueError("it is not what was written")
        return data[:length]

    def _close(self, length: int, checksum: int) -> None:
        self._sealed = length, checksum
        if self.seal is not None:
            write_json(self.seal, {"bytes": length, "crc32": checksum})


def _encoded(rows: Iterable[Sequence[Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([c if isinstance(c, str) else repr(c) for c in row] for row in rows)
    return stream.getvalue().encode("utf-8")
