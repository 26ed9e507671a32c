"""Clouds as text: one point a line, its numbers apart by blanks, commas or semicolons."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmd_plugin.errors import InputError

__all__ = ["read_text"]

_AXES = ("x", "y", "z")
_COUNT = re.compile(r"[0-9]{1,12}")
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+(?:[eE][-+]?[0-9]+)?")


def read_text(path: Path) -> NDArray[Any]:
    """Read a cloud, [N, 3 or more] float64.

    Left out are blank lines, what follows a ``#``, and lines that hold nothing but the number of
    points that follow, if that is right (``.pts``). A first line of names, as of a table, says
    which columns are x, y and z.

    Raises:
        InputError: If numbers have commas for decimal points, there are fewer or more points than
            announced, or the names do not say where x, y and z are.
        ValueError: If something is no text or no number, or lines differ in length.
    """
    text = path.read_text(encoding="utf-8-sig")
    lines = [kept for line in text.splitlines() if (kept := line.partition("#")[0].strip())]
    titled = bool(lines) and not all(map(_is_number, re.split(r"[\s,;]+", lines[0].strip(",;"))))
    rows = _without_counts(path, lines[titled:])
    if not rows:
        raise InputError(f"{path} holds no points: give a file with one point a line.")
    mark = _separator(path, rows)
    table: NDArray[Any] = np.loadtxt(rows, delimiter=mark, comments=None, ndmin=2)
    if not titled:
        return table
    names = [word.strip(" \t\"'/").lower() for word in lines[0].split(mark)]
    if len(names) != table.shape[1] or any(names.count(axis) != 1 for axis in _AXES):
        raise InputError(
            f"{path} begins with {lines[0][:60]!r}, which does not say which of its "
            f"{table.shape[1]} columns are x, y and z: name them so, or remove that line."
        )
    return table[:, [names.index(axis) for axis in _AXES]]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _separator(path: Path, rows: list[str]) -> str | None:
    """What stands between the numbers: a semicolon, a comma, or (None) blanks.

    A comma that separates some numbers while blanks separate others is a decimal one.
    """
    mark = next((mark for mark in ";," if any(mark in row for row in rows)), None)
    if mark is None:
        return None
    words = [word.strip() for row in rows for word in row.split(mark)]
    if not any(len(re.split(r"[\s,]+", word)) > 1 for word in words):
        return mark
    if any(_DECIMAL_COMMA.fullmatch(word) for row in rows for word in re.split(r"[;\s]+", row)):
        raise InputError(f"{path} has commas for decimal points: write 1.5 for 1,5.")
    raise InputError(f"{path} has {mark!r} between some numbers, not between all: use one sign.")


def _without_counts(path: Path, rows: list[str]) -> list[str]:
    """The points of one block after another, each after a line with its number of points."""
    if not any(map(_COUNT.fullmatch, rows)):
        return rows
    points: list[str] = []
    place = 0
    while place < len(rows):
        count = int(rows[place]) if _COUNT.fullmatch(rows[place]) else -1
        block = rows[place + 1 : place + 1 + max(count, 0)]
        if len(block) != count or any(map(_COUNT.fullmatch, block)):
            raise InputError(
                f"{path} does not hold as many points as its lines of one number say: remove those "
                "lines if they are no numbers of points, else copy it again."
            )
        points += block
        place += 1 + count
    return points
