"""Checks of constructor arguments: a wrong one has to fail where it was written, not mid-run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from cmd_plugin.errors import InputError

__all__ = ["fraction", "one_of", "patterns", "whole"]

_Choice = TypeVar("_Choice", bound=str)


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is a whole number in ``low..high``, else raise InputError."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"{low} to {high}"
        extra = ", or a fraction between 0 and 1" if name == "warmup" else ""
        message = f"{name} must be a whole number, {bound}{extra}; it is {value!r}."
        raise InputError(message)
    return int(value)


def fraction(name: str, value: Any) -> float:
    """Return ``value`` if it is above 0 and at most 1, else raise InputError."""
    if not 0 < value <= 1:
        message = f"{name} must be above 0 and at most 1; it is {value!r}."
        raise InputError(message)
    return float(value)


def one_of(name: str, value: _Choice, choices: tuple[str, ...]) -> _Choice:
    """Return ``value`` if it is one of ``choices``, else raise InputError."""
    if value not in choices:
        message = f"{name} must be one of {', '.join(choices)}; it is {value!r}."
        raise InputError(message)
    return value


def patterns(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Return ``value`` as a tuple of strings; a lone string would be read letter by letter."""
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        message = f"{name} must be a list of patterns (globs), such as ['net.*']; it is {value!r}."
        raise InputError(message)
    return tuple(value)
