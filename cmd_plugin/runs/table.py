"""A table that grows row by row on disk, and stays readable when a process is killed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmd_plugin.errors import InputError
from cmd_plugin.runs.files import unwritable, write_atomically

__all__ = ["Table"]

_ADVICE = "start again with --overwrite"


class Table:
    """Rows of a CSV file, typed by column.

    Floats are written with all their digits. A row that a kill cut short is not there.

    Args:
        path: The file; made with its header when the first row comes.
        columns: Name -> type (``int``, ``float`` or ``str``) of each column.
    """

    def __init__(self, path: Path, columns: Mapping[str, Callable[[str], Any]]) -> None:
        self.path = path
        self.columns = dict(columns)

    def append(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add rows.

        Raises:
            InputError: If they cannot be written.
        """
        if not self.path.exists():
            self.replace(rows)
            return
        with unwritable(self.path), self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(map(_cells, rows))

    def replace(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write the whole table anew, in one step."""

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerow(self.columns)
                writer.writerows(map(_cells, rows))

        write_atomically(self.path, write)

    def rows(self) -> list[tuple[Any, ...]]:
        """Return all complete rows, in the order they were written.

        Raises:
            InputError: If the file is damaged.
        """
        if not self.path.exists():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as stream:
                lines = stream.read().splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]
            header, *rows = csv.reader(complete)
            if header != list(self.columns):
                raise ValueError(f"its columns are {', '.join(header)}")
            return [self._typed(row) for row in rows]
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{self.path} is damaged ({error}): {_ADVICE}.") from error

    def _typed(self, row: Sequence[str]) -> tuple[Any, ...]:
        kinds = self.columns.values()
        return tuple(kind(cell) for kind, cell in zip(kinds, row, strict=True))


def _cells(row: Sequence[Any]) -> list[str]:
    return [cell if isinstance(cell, str) else repr(cell) for cell in row]
