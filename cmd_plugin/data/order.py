"""The order people expect of numbered files: 2 before 10."""

from __future__ import annotations

import re
from pathlib import PurePath

__all__ = ["natural_key"]

_DIGITS = re.compile(r"([0-9]+)")

_Word = tuple[str, int, str]


def natural_key(path_or_text: PurePath | str) -> tuple[tuple[tuple[_Word, ...], ...], str]:
    """Key for :func:`sorted` under which digits compare as numbers.

    A path is compared folder by folder, so that `checkpoint-100/model` comes after
    `checkpoint-20/model`; in a text, `/` separates the folders. Negative numbers are not known: a
    minus is a letter. Names that differ only in leading zeros keep one order, by their characters.

    Args:
        path_or_text: A path, or a name or path as text.
    """
    if isinstance(path_or_text, PurePath):
        parts = path_or_text.parts
    else:
        parts = tuple(path_or_text.split("/"))
    return tuple(_split_numbers(part) for part in parts), str(path_or_text)


def _split_numbers(part: str) -> tuple[_Word, ...]:
    """Pairs of letters and the number behind them; a number is its length, then its digits.

    Numbers stay text, because `int` refuses those of more than 4300 digits.
    """
    pieces = [*_DIGITS.split(part), ""]
    numbers = [digits.lstrip("0") for digits in pieces[1::2]]
    return tuple(
        (letters, len(digits), digits) for letters, digits in zip(pieces[::2], numbers, strict=True)
    )
